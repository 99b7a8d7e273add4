#!/usr/bin/env python3
"""Writes tests/fuzz/corpus: small well-formed inputs, one folder per fuzz target, from which libFuzzer starts.

What is in the repository was made by this script; run it again after a change of a format. It takes the config and the
tokenizer of the shipped model and makes the rest up. Files that libFuzzer found by itself are not kept here.
"""
import base64
import json
import pathlib
import struct

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "fuzz" / "corpus"
DEMO = ROOT / "models" / "demo"


def save(target, name, data):
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def safetensors(header, data=b"", pad=True):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    if pad:
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def make_safetensors():
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
             "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
    save("safetensors", "empty", safetensors({}))
    save("safetensors", "one", safetensors({"a": tensor("F32", [2, 3], 0, 24)}, bytes(range(24))))
    header, at = {"__metadata__": {"format": "pt", "é": "\u20ac \" \\ \n"}}, 0
    for name, size in sizes.items():
        header["t." + name] = tensor(name, [2], at, at + 2 * size)
        at += 2 * size
    save("safetensors", "types", safetensors(header, bytes(at)))
    save("safetensors", "shapes", safetensors({
        "scalar": tensor("F32", [], 0, 4), "none": tensor("BF16", [0, 7], 4, 4),
        "deep": tensor("U8", [1, 2, 1, 2, 1], 4, 8), "odd": tensor("I8", [1], 8, 9),
        "unaligned": tensor("F32", [1], 9, 13)}, bytes(13), pad=False))
    save("safetensors", "gap", safetensors({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 3, 5)}, bytes(5)))
    save("safetensors", "large_shape", safetensors({"a": tensor("F32", [1 << 40, 1 << 40], 0, 4)}, bytes(4)))
    save("safetensors", "escapes", safetensors(b'{"\\u0061\\n\\ud83d\\ude0a":{"shape":[1],"dtype":"U8",'
                                               b'"data_offsets":[0,1]},"__metadata__":{}}', b"x"))
    save("safetensors", "index", json.dumps({"metadata": {"total_size": 8, "more": [1, {"a": None}]}, "weight_map": {
        "model.norm.weight": "model-00001-of-00002.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}}))


def make_config():
    text = (DEMO / "config.json").read_text()
    config = json.loads(text)
    save("config", "demo", text)
    small = dict(config, num_hidden_layers=2, vocab_size=64, eos_token_id=[1, 2])
    small.pop("mlp_layer_types", None)
    small["layer_types"] = ["linear_attention", "full_attention"]
    small["linear_attn_config"] = dict(config["linear_attn_config"], kda_layers=[1], full_attn_layers=[2])
    save("config", "small", json.dumps(small))
    no_types = {k: v for k, v in small.items() if k != "layer_types"}
    save("config", "no_layer_types", json.dumps(no_types))
    no_lists = dict(small, linear_num_heads=2, linear_head_dim=8, linear_conv_kernel_dim=4)
    no_lists["linear_attn_config"] = None
    no_lists["mlp_layer_types"] = ["dense", "sparse"]
    save("config", "no_lists", json.dumps(no_lists))
    save("config", "dense", json.dumps(dict(small, num_experts=0)))
    save("config", "softmax_groups", json.dumps(dict(
        small, moe_router_activation_func="softmax", num_expert_group=2, topk_group=1, use_grouped_topk=True)))
    save("config", "wrong", json.dumps(dict(small, vocab_size=-1, hidden_size="x", rms_norm_eps=[], attention_bias=True)))
    save("config", "relative", json.dumps(dict(small, attn_res_block_size=2)))


def ranks(tokens, first):
    return "".join(f"{base64.b64encode(t).decode()} {first + i}\n" for i, t in enumerate(tokens))


def make_rank_file():
    single = [bytes([b]) for b in range(256)]
    merges = [b"he", b" t", b"the", "é".encode(), "\u6f22".encode(), b"    ", b"ab", b"abab", b"longer than eight"]
    save("rank_file", "bytes", ranks(single, 0))
    save("rank_file", "whole", ranks(single + merges, 0))
    save("rank_file", "merges", ranks(merges, 256))
    save("rank_file", "line_ends", ranks(merges, 256).replace("\n", "\r\n") + "\n\n")
    demo = (DEMO / "tiktoken.model").read_text().splitlines()
    save("rank_file", "demo_lines", "\n".join(demo[256:296]) + "\n")
    added = {str(i): {"content": f"<|name_{i}|>", "special": i % 2 == 0, "lstrip": False} for i in range(256, 262)}
    added["263"] = {"content": "[BOS]"}
    added["900"] = {"content": "beyond the embedding"}
    save("rank_file", "tokenizer_config", json.dumps({"bos_token": "[BOS]", "added_tokens_decoder": added}))


def make_chat():
    section, end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    call = "<|tool_call_begin|>{}<|tool_call_argument_begin|>{}<|tool_call_end|>".format
    save("chat", "plain", "Hello, w\u00f6rld \u6f22 \U0001f60a <|im_end|>")
    save("chat", "calls", "Let me see." + section + call("functions.get_weather:0", '{"city": "Oslo"}') + "\n" +
         call(" functions.now:1 ", "") + end + " done")
    save("chat", "cut_call", section + "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{\"a\"")
    save("chat", "missing_markers", section + "junk<|tool_call_begin|>a.f:0<|tool_call_begin|>a.g:1" + end + "x")
    tools = json.dumps([{"type": "function", "function": {"name": "get_weather", "description": "caf\u00e9 \" \\",
                        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "n": [
                            0, -1, 1.5, 1e-7, 1e22, 18446744073709551615, None, True]}}}], ensure_ascii=False)
    messages = [["system", "You are.", "", ""], ["user", "Weather in <|im_end|> Oslo?", "anna", ""],
                ["assistant", "Let me see.", "", ""], ["+", "", "get_weather", '{"city": "Oslo"}'],
                ["+", "functions.now:7", "", "{}"], ["tool", "12 degrees", "", "functions.get_weather:0"]]
    save("chat", "conversation", "\x1f".join([tools] + [f for m in messages for f in m + [""]]))
    save("chat", "no_tools", "\x1f".join([""] + ["user", "hi", "", "", ""]))
    save("chat", "empty_tools", "\x1f".join(["[]"] + ["user", "hi", "", "", ""]))
    save("chat", "bytes", bytes(range(256)))


def make_session():
    """For the model of fuzz_session.cc, which puts fingerprint and checksum right by itself."""
    vocab = 6
    kda, conv, latent_row = 1 * 2 * 2 * 4, 3 * 2 * (2 - 1) * 4, 3 * 4
    for tokens in (1, 5, 17, 40):
        state = kda + conv + latent_row * tokens
        size = 64 + 4 * tokens + 4 * vocab + state + 8
        header = b"KLSESS\r\n" + struct.pack("<IIQQQQQQ", 2, 32, 0, size, tokens, vocab, state, tokens - 1)
        ids = struct.pack(f"<{tokens}i", *(i % vocab for i in range(tokens)))
        logits = struct.pack(f"<{vocab}f", *(i / 2 for i in range(vocab)))
        save("session", f"tokens_{tokens}", header + ids + logits + bytes(i % 251 for i in range(state)) + bytes(8))


def main():
    for make in (make_safetensors, make_config, make_rank_file, make_chat, make_session):
        make()
    files = [p for p in CORPUS.rglob("*") if p.is_file()]
    print(f"{len(files)} files, {sum(p.stat().st_size for p in files)} bytes")


if __name__ == "__main__":
    main()
