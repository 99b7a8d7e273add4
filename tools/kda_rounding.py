#!/usr/bin/env python3
"""What each rounding of the Hopper prefill costs: its arithmetic in f64 with bf16 where the kernel has it, beside the
recurrence. Needs numpy.

  tools/kda_rounding.py [--tokens T] [--seeds N]

Columns: rel-RMS of o with all roundings, then with one of them left out: decays (from2, keep's own), the factors that read
(read_k, read_q) and write (keep), F = T'^T keep, A, A T', the state as an operand, R, and o itself. Rows: gate, strengths
(sigmoid or twice that, shifted by 3), write factors with rounded decays or not. Whole sequences, one head of 128, random
inputs; kda_cuda_bench measured 4.60e-3 (bounded, rounded), 4.46e-3 (weak, rounded) and 4.23e-3 (softplus, not) where this
prints 4.5e-3, 4.5e-3 and 4.2e-3.
"""
import argparse

import numpy as np

CHUNK, D = 16, 128
ROUNDINGS = ("from2", "read_k", "read_q", "keep", "F", "A", "AT", "S", "R", "o")


def bf16(x):
    u = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16 << 16
    return u.astype(np.uint32).view(np.float32).astype(np.float64)


def problem(gate, twice, tokens, seed):
    r = np.random.default_rng(seed)
    q, k, v, x = (bf16(r.standard_normal((tokens, D))) for _ in range(4))
    if gate == "softplus":  # as a 48B begins
        dt = np.exp(r.uniform(np.log(1e-3), np.log(1e-1), D))
        g = -r.uniform(1, 16) * np.log1p(np.exp(x + dt + np.log(-np.expm1(-dt))))
    else:
        g = {"bounded": -5, "weak": -0.1}[gate] / (1 + np.exp(-x))
    b = r.standard_normal(tokens)
    beta = 2 / (1 + np.exp(-b - 3)) if twice else 1 / (1 + np.exp(-b))
    return q, k, v, g, beta, r.standard_normal((D, D))


def recurrence(q, k, v, g, beta, S):
    k = k / np.sqrt((k * k).sum(1, keepdims=True) + 1e-6)
    q = q / np.sqrt((q * q).sum(1, keepdims=True) + 1e-6) / np.sqrt(D)
    o = np.empty_like(v)
    for t in range(len(q)):
        S = np.exp(g[t])[:, None] * S
        S = S + beta[t] * np.outer(k[t], v[t] - k[t] @ S)
        o[t] = q[t] @ S
    return o


def prefill(q, k, v, g, beta, S, exact_writes, without):
    def rounded(name, x):
        return x if name == without else bf16(x)

    nk = 1 / np.sqrt((k * k).sum(1) + 1e-6)
    nq = 1 / np.sqrt((q * q).sum(1) + 1e-6) / np.sqrt(D)
    o, after = np.empty_like(v), np.ones(D)
    for c in range(0, len(q), CHUNK):
        at = slice(c, c + CHUNK)
        G = np.cumsum(g[at], 0)
        middle = G[CHUNK // 2 - 1]
        from2, to = rounded("from2", np.exp(G - middle)), np.exp(middle - G)
        read_k, read_q = rounded("read_k", k[at] * from2), rounded("read_q", q[at] * from2)
        keep = rounded("keep", k[at] * (to if exact_writes or without == "keep" else bf16(to)))
        n, b = nk[at], beta[at]
        L, A = np.tril(read_k @ keep.T, -1), rounded("A", np.tril(read_q @ keep.T))
        T = n[:, None] * np.linalg.inv(np.eye(len(n)) + (b * n)[:, None] * L * n) * (b / n)
        S = S * (after * np.exp(middle))[:, None]
        operand = rounded("S", S)
        R = rounded("R", (n ** 2)[:, None] * (v[at] / n[:, None] - read_k @ operand))
        o[at] = rounded("o", nq[at][:, None] * (read_q @ operand + rounded("AT", A @ T) @ R))
        S = S + rounded("F", T.T @ keep).T @ R
        after = np.exp(G[-1] - middle)
    return o


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    arguments.add_argument("--tokens", type=int, default=2000)
    arguments.add_argument("--seeds", type=int, default=2)
    options = arguments.parse_args()
    if options.tokens < 1 or options.seeds < 1:
        arguments.error("expected at least one token and one seed")
    print(f"{'':33}" + "".join(f"{name:>9}" for name in ("all",) + ROUNDINGS))
    for gate in ("bounded", "weak", "softplus"):
        for twice in (False, True):
            cases = [problem(gate, twice, options.tokens, seed) for seed in range(1, options.seeds + 1)]
            references = [recurrence(*case) for case in cases]
            for exact_writes in (False, True):
                row = []
                for without in (None,) + ROUNDINGS:
                    errors = [np.linalg.norm(prefill(*case, exact_writes, without) - o) / np.linalg.norm(o)
                              for case, o in zip(cases, references)]
                    row.append(np.mean(errors))
                print(f"{gate:9}{'beta to 2' if twice else 'beta to 1':10}{'writes exact' if exact_writes else 'writes rounded':14}"
                      + "".join(f"{x:9.2e}" for x in row), flush=True)


if __name__ == "__main__":
    main()
