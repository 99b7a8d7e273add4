#include "text/tokenizer.h"

#include <filesystem>
#include <fstream>
#include <sstream>

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <unistd.h>

#include "text/test_text.h"

namespace kl {
namespace {

using testing::error_of;
using testing::kimi_tokenizer;
using testing::rank_file;
using Ids = std::vector<int32_t>;

std::string golden(const std::string& name) {
  return read_text_file(testing::golden_path("kimi-vocab/" + name));
}

std::vector<std::string> lines(const std::string& text) {
  std::vector<std::string> found;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) found.push_back(line);
  return found;
}

Ids ids_of(const std::string& line) {  // "65, 564, 20245"
  Ids ids;
  std::istringstream in(line);
  for (std::string number; std::getline(in, number, ',');) ids.push_back(std::stoi(number));
  return ids;
}

std::string with(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size()))
    text.replace(at, from.size(), to);
  return text;
}

std::string joined_bytes(const Tokenizer& tokenizer, const Ids& ids) {
  std::string bytes;
  for (const int32_t id : ids) bytes += tokenizer.bytes_of(id);
  return bytes;
}

void expect_golden(const std::vector<std::string>& texts, const std::vector<Ids>& expected) {
  ASSERT_EQ(texts.size(), expected.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    EXPECT_EQ(kimi_tokenizer().encode(texts[i]), expected[i]) << "line " << i + 1;
    EXPECT_EQ(kimi_tokenizer().decode(expected[i]), texts[i]) << "line " << i + 1;
  }
}

// In the small file "\n" and "\s" stand for a newline and a space.
TEST(Tokenizer, GoldenSmall) {
  std::vector<std::string> texts;
  std::vector<Ids> expected;
  for (const std::string& line : lines(golden("small_input.txt")))
    texts.push_back(with(with(line, "\\n", "\n"), "\\s", " "));
  for (const std::string& line : lines(golden("small_tokens_kimi_k2.txt"))) expected.push_back(ids_of(line));
  EXPECT_EQ(texts.size(), 20u);
  expect_golden(texts, expected);
}

TEST(Tokenizer, GoldenMixed) {
  std::vector<Ids> expected;
  for (const std::string& line : lines(golden("mixed_tokens_kimi_k2.txt"))) expected.push_back(ids_of(line));
  EXPECT_EQ(expected.size(), 120u);
  expect_golden(lines(golden("mixed_input.txt")), expected);
}

// The whole file is one text.
TEST(Tokenizer, GoldenUtf8) {
  expect_golden({golden("utf8_input.txt")}, {ids_of(golden("utf8_tokens_kimi_k2.txt"))});
}

TEST(Tokenizer, SpecialIds) {
  const Tokenizer& t = kimi_tokenizer();
  EXPECT_EQ(t.vocab_size(), 163840);
  EXPECT_EQ(t.ranks(), 163584);
  EXPECT_EQ(t.special_id("[BOS]"), 163584);
  EXPECT_EQ(t.special_id("<|reserved_token_163589|>"), 163589);
  EXPECT_EQ(t.special_id("<|reserved_token_163600|>"), 163600);
  EXPECT_EQ(t.special_id("[PAD]"), 163839);
  EXPECT_EQ(t.special_id("<|reserved_token_163840|>"), std::nullopt);  // no row in the embedding
  EXPECT_EQ(t.special_id("<|reserved_token_163584|>"), std::nullopt);  // has another name
  EXPECT_EQ(t.special_id("[BOS"), std::nullopt);
  EXPECT_EQ(t.special_id("[BOS] "), std::nullopt);
  EXPECT_EQ(t.special_id(""), std::nullopt);
  EXPECT_EQ(t.bytes_of(163586), "<|im_end|>");
  EXPECT_FALSE(t.is_special(163583));
  EXPECT_TRUE(t.is_special(163584));
  EXPECT_TRUE(t.is_special(163595));
  EXPECT_TRUE(t.is_skipped(163586));
  EXPECT_FALSE(t.is_skipped(163595));
  EXPECT_FALSE(t.is_skipped(0));
  for (const int32_t id : {-1, 163840, 163841, INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(error_of([&] { t.bytes_of(id); }), cat("token id ", id, ", expected 0 to 163839"));
    EXPECT_NE(error_of([&] { t.decode({0, id}); }), "");
    EXPECT_NE(error_of([&] { (void)t.is_special(id); }), "");
  }
}

TEST(Tokenizer, SpecialNamesAreTextUnlessAskedFor) {
  const Tokenizer& t = kimi_tokenizer();
  const std::string text = "[BOS]a<|im_end|><|im_end|> b<|reserved_token_163589|><|im_end|";
  for (const int32_t id : t.encode(text)) EXPECT_FALSE(t.is_special(id));
  Ids expected{163584};
  t.encode_append("a", false, expected);
  expected.insert(expected.end(), {163586, 163586});
  t.encode_append(" b", false, expected);
  expected.push_back(163589);
  t.encode_append("<|im_end|", false, expected);
  EXPECT_EQ(t.encode(text, true), expected);
  EXPECT_EQ(t.decode(expected), text);
  // The two ids beyond the vocabulary are never made.
  EXPECT_EQ(t.encode("<|reserved_token_163840|>", true), t.encode("<|reserved_token_163840|>", false));
}

// The split pattern sees the end of a segment as the end of the text: "(?!\S)" holds before a special token.
TEST(Tokenizer, SegmentsAreSplitOnTheirOwn) {
  const Tokenizer& t = kimi_tokenizer();
  Ids expected = t.encode("a   ");
  expected.push_back(163586);
  t.encode_append("b", false, expected);
  EXPECT_EQ(t.encode("a   <|im_end|>b", true), expected);
}

TEST(Tokenizer, SkipSpecialKeepsToolTokens) {
  const Tokenizer& t = kimi_tokenizer();
  const Ids ids = t.encode("[BOS]hi<|tool_call_begin|>f<|im_end|>", true);
  EXPECT_EQ(t.decode(ids, true), "hi<|tool_call_begin|>f");
  EXPECT_EQ(t.decode(ids), "[BOS]hi<|tool_call_begin|>f<|im_end|>");
}

TEST(Tokenizer, LongestSpecialNameWins) {
  const Tokenizer t = Tokenizer::from_memory(rank_file({}), {{256, "<a"}, {257, "<ab>"}, {258, "b"}}, 259);
  EXPECT_EQ(t.encode("<ab><ab<a>b", true), (Ids{257, 256, 258, 256, '>', 258}));
}

TEST(Tokenizer, IllFormedBytesAreKept) {
  const Tokenizer& t = kimi_tokenizer();
  const std::string text = "caf\xE9 \xE2\x82 ok\xFF";
  const Ids ids = t.encode(text);
  EXPECT_EQ(joined_bytes(t, ids), text);
  EXPECT_EQ(t.decode(ids), "caf\uFFFD \uFFFD ok\uFFFD");
}

RC_GTEST_PROP(Tokenizer, AnyBytesComeBack, ()) {
  const Tokenizer& t = kimi_tokenizer();
  const std::string bytes = *rc::gen::oneOf(testing::any_bytes(), testing::mixed_text());
  for (const bool parse_special : {false, true}) {
    const Ids ids = t.encode(bytes, parse_special);
    RC_ASSERT(joined_bytes(t, ids) == bytes);
    for (const int32_t id : ids) RC_ASSERT(parse_special || !t.is_special(id));
  }
}

std::string config(const std::string& added) { return R"({"added_tokens_decoder": {)" + added + "}}"; }

// A directory with the two files, removed at the end.
class ModelDirectory {
 public:
  ModelDirectory(const std::string& ranks, const std::string& tokenizer_config) {
    std::string name = (std::filesystem::temp_directory_path() / "kl-text-XXXXXX").string();
    KL_CHECK(mkdtemp(name.data()), "no temporary directory");
    path_ = name;
    std::ofstream(path_ + "/tiktoken.model") << ranks;
    std::ofstream(path_ + "/tokenizer_config.json") << tokenizer_config;
  }
  ~ModelDirectory() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// What load says, with the directory taken out.
std::string load_error(const std::string& ranks, const std::string& tokenizer_config, int vocab_size = 300) {
  const ModelDirectory directory(ranks, tokenizer_config);
  return with(error_of([&] { Tokenizer::load(directory.path(), vocab_size); }), directory.path(), "DIR");
}

TEST(TokenizerLoad, ShippedModel) {
  const Tokenizer t = Tokenizer::load(testing::demo_model(), 8192);
  EXPECT_EQ(t.ranks(), 7936);
  EXPECT_EQ(t.vocab_size(), 8192);
  EXPECT_EQ(t.special_id("<|im_end|>"), 7938);
  EXPECT_EQ(t.special_id("<|reserved_token_7941|>"), 7941);
  EXPECT_EQ(t.encode("It is a truth universally acknowledged, that a single man"),
            (Ids{1536, 367, 258, 1958, 4530, 508, 2983, 44, 337, 258, 2863, 472}));
}

TEST(TokenizerLoad, NamesAndFlags) {
  const ModelDirectory directory(
      rank_file({}),
      config(R"("256": {"content": "[A]", "special": true}, "258": {"content": "[B]", "special": false},
                               "259": {"content": "[C]"}, "300": {"content": "[out]"}, "301": {"content": "[A]"})"));
  const Tokenizer t = Tokenizer::load(directory.path(), 300);
  EXPECT_EQ(t.bytes_of(256), "[A]");
  EXPECT_EQ(t.bytes_of(257), "<|reserved_token_257|>");
  EXPECT_TRUE(t.is_skipped(256) && !t.is_skipped(258) && t.is_skipped(259) && t.is_skipped(299));
  EXPECT_EQ(t.special_id("[out]"), std::nullopt);
}

TEST(TokenizerLoad, NoNamesAreFine) {
  const ModelDirectory directory(rank_file({}), "{}");
  EXPECT_EQ(Tokenizer::load(directory.path(), 257).bytes_of(256), "<|reserved_token_256|>");
  EXPECT_EQ(Tokenizer::load(directory.path(), 256).vocab_size(), 256);
}

TEST(TokenizerLoad, SaysWhatIsWrongWhere) {
  const std::string ranks = rank_file({});
  EXPECT_EQ(load_error(ranks, config("")), "");
  EXPECT_EQ(load_error(ranks + "!", "{}"), "DIR/tiktoken.model:257: expected \"base64 rank\"");
  EXPECT_EQ(load_error(ranks, "{}", 255), "DIR/tiktoken.model: 256 ranks, expected at most vocab_size = 255");
  EXPECT_EQ(load_error(ranks, "{}", 2'000'000'000), "vocab_size is 2000000000, expected at most 1048576");
  EXPECT_EQ(load_error(ranks, "[]"), "DIR/tokenizer_config.json: expected an object");
  EXPECT_TRUE(load_error(ranks, "{").starts_with("DIR/tokenizer_config.json: not JSON: "));
  EXPECT_EQ(load_error(ranks, std::string(200'000, '[')),
            "DIR/tokenizer_config.json: nested deeper than 100 levels");
  const std::string where = "DIR/tokenizer_config.json: added_tokens_decoder: ";
  EXPECT_EQ(load_error(ranks, R"({"added_tokens_decoder": 3})"), where + "expected an object");
  EXPECT_EQ(load_error(ranks, config(R"("x": {"content": "a"})")), where + "\"x\" is not an id");
  EXPECT_EQ(load_error(ranks, config(R"("-1": {"content": "a"})")), where + "\"-1\" is not an id");
  EXPECT_EQ(load_error(ranks, config(R"("99999999999": {"content": "a"})")),
            where + "\"99999999999\" is not an id");
  EXPECT_EQ(load_error(ranks, config(R"("256": {"content": "a"}, "0256": {"content": "b"})")),
            where + "the id 256 twice");
  for (const char* bad : {"3", "null", "{}", R"({"content": 3})", "[]"})
    EXPECT_EQ(load_error(ranks, config(cat("\"256\": ", bad))),
              where + "256: expected an object with a string \"content\"");
  EXPECT_EQ(load_error(ranks, config(R"("256": {"content": "a", "special": 1})")),
            where + "256: expected true or false for \"special\"");
  EXPECT_EQ(load_error(ranks, config(R"("256": {"content": "a"}, "299": {"content": "a"})")),
            "DIR/tokenizer_config.json: the ids 256 and 299 have the same name \"a\"");
  EXPECT_EQ(load_error(ranks, config(R"("257": {"content": "<|reserved_token_256|>"})")),
            "DIR/tokenizer_config.json: the ids 256 and 257 have the same name \"<|reserved_token_256|>\"");
  EXPECT_EQ(load_error(ranks, config(R"("5": {"content": "a"})")),
            "DIR/tokenizer_config.json: \"a\" has the id 5, expected one after the 256 ranks");
  EXPECT_EQ(load_error(ranks, config(R"("256": {"content": ""})")),
            "DIR/tokenizer_config.json: the name of id 256 has 0 bytes, expected 1 to 256");
  EXPECT_NE(load_error(ranks, config(cat(R"("256": {"content": ")", std::string(257, 'a'), "\"}"))), "");
  EXPECT_NE(error_of([] { Tokenizer::load("/nonexistent", 300); }), "");
}

// A method that is quadratic in the length takes minutes for these 4 MB; this one at most 0.8 s, and the
// bound leaves room for sanitizers and busy machines.
class LongTexts : public ::testing::TestWithParam<const char*> {};

TEST_P(LongTexts, TakeLinearTime) {
  const std::string unit = GetParam();
  std::string text;
  while (text.size() < 4'000'000) text += unit;
  kimi_tokenizer();
  const double begin = testing::cpu_seconds();
  const Ids ids = kimi_tokenizer().encode(text, true);
  EXPECT_LT(testing::cpu_seconds() - begin, 10.0);
  EXPECT_TRUE(joined_bytes(kimi_tokenizer(), ids) == text);
}

INSTANTIATE_TEST_SUITE_P(Units, LongTexts,
                         ::testing::Values("a", "A", " ", "\n", " \n", "7", "漢", "あ", "ABあ", "=", "<",
                                           "<|im_", "\u0301", "!\u0301", "\u3000", "\xFF", "\xE2\x82",
                                           "q8Zk漢 \n'S", "The quick brown fox, 12345 漢字かな! "));

TEST(Detokenizer, HoldsBackUnfinishedCharacters) {
  const Tokenizer t = Tokenizer::from_memory(rank_file({"\x9F\x98", "\x8A!"}), {{258, "[X]"}}, 259);
  Detokenizer d(t);
  EXPECT_EQ(d.push('a'), "a");
  EXPECT_EQ(d.push(0xF0), "");
  EXPECT_EQ(d.push(256), "");
  EXPECT_EQ(d.push(257), "\U0001F60A!");
  EXPECT_EQ(d.push(0xE2), "");
  EXPECT_EQ(d.push(258), "\uFFFD[X]");
  EXPECT_EQ(d.push(0xE2), "");
  EXPECT_EQ(d.push(0x82), "");
  EXPECT_EQ(d.finish(), "\uFFFD");
  EXPECT_EQ(d.finish(), "");
  EXPECT_NE(error_of([&] { d.push(259); }), "");
}

RC_GTEST_PROP(Detokenizer, PushesJoinedAreDecode, ()) {
  static const Tokenizer t = Tokenizer::from_memory(rank_file({"\xE2\x82", "\x9F\x98", "\xAC\xF0", "ab"}),
                                                    {{260, "[X]"}}, 270, {261});
  const auto id =
      rc::gen::oneOf(rc::gen::inRange(0, 270), rc::gen::inRange(0x80, 0x100), rc::gen::inRange(256, 270));
  const Ids ids = *rc::gen::container<Ids>(id);
  const bool skip_special = *rc::gen::arbitrary<bool>();
  Detokenizer d(t, skip_special);
  std::string streamed;
  for (const int32_t i : ids) {
    const std::string piece = d.push(i);
    const char* const end = piece.data() + piece.size();
    for (const char* p = piece.data(); p < end; p += utf8_char(p, end).length)
      RC_ASSERT(utf8_char(p, end).kind == Utf8Char::Kind::well_formed);
    streamed += piece;
  }
  streamed += d.finish();
  RC_ASSERT(streamed == t.decode(ids, skip_special));
}

}  // namespace
}  // namespace kl
