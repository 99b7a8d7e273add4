// Writing safetensors: what is written comes back, and a file appears whole or not at all.
#include <gtest/gtest.h>
// After gtest, which it uses without naming it.
#include <rapidcheck/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstring>

#include "io/atomic_file.h"
#include "io/safetensors_header.h"
#include "io/test_files.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl {
namespace {

using testing::fails_with;
using testing::TempDir;

// A tensor of any type, rank 0 to 4, sizes 0 to 5, with random bytes.
OwnedTensor random_tensor(testing::Random& random) {
  const auto dtype = static_cast<DType>(random.integer(0, static_cast<int>(DType::boolean)));
  int64_t n[4];
  for (int64_t& size : n) size = random.integer(0, 5);
  OwnedTensor t;
  switch (random.integer(0, 4)) {
    case 0: t = make_tensor(dtype, {}); break;
    case 1: t = make_tensor(dtype, {n[0]}); break;
    case 2: t = make_tensor(dtype, {n[0], n[1]}); break;
    case 3: t = make_tensor(dtype, {n[0], n[1], n[2]}); break;
    case 4: t = make_tensor(dtype, {n[0], n[1], n[2], n[3]}); break;
  }
  for (int64_t i = 0; i < t.tensor.bytes(); ++i) {
    t.buffer.data()[i] = static_cast<std::byte>(random.bits());
  }
  return t;
}

// Text with everything that JSON must escape, and with letters of one to four bytes.
std::string random_text(testing::Random& random) {
  const std::string letters[] = {"a",
                                 "layers.0",
                                 "\"",
                                 "\\",
                                 "\n",
                                 "\x01",
                                 "/",
                                 "\xc3\xa9",
                                 "\xe6\x9c\x88",
                                 "\xf0\x9f\x8c\x99",
                                 std::string(1, '\0')};
  std::string text;
  for (int64_t n = random.integer(0, 6); n > 0; --n) text += letters[random.integer(0, 10)];
  return text;
}

RC_GTEST_PROP(SafetensorsWrite, WhatIsWrittenComesBack, (uint64_t seed)) {
  testing::Random random(seed);
  std::map<std::string, OwnedTensor> owners;
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata;
  for (int64_t n = random.integer(0, 12); n > 0; --n) owners[random_text(random)] = random_tensor(random);
  for (const auto& [name, owner] : owners) tensors[name] = owner.tensor;
  for (int64_t n = random.integer(0, 3); n > 0; --n) metadata[random_text(random)] = random_text(random);

  const TempDir dir;
  const std::string path = dir / "t.safetensors";
  write_safetensors(path, tensors, metadata);
  const SafetensorsFile file = SafetensorsFile::open(path);
  RC_ASSERT(file.metadata() == metadata);
  RC_ASSERT(file.entries().size() == tensors.size());
  for (const SafetensorsFile::Entry& entry : file.entries()) {
    RC_ASSERT(tensors.count(entry.name) == 1u);
    const Tensor& t = tensors[entry.name];
    RC_ASSERT(entry.dtype == t.dtype);
    RC_ASSERT(entry.is_aligned());
    RC_ASSERT(entry.tensor().shape_string() == t.shape_string());
    RC_ASSERT(testing::same_bits(entry.tensor(), t));
  }
  RC_ASSERT(dir.names() == std::vector<std::string>{"t.safetensors"});  // no temporary file
}

// The bytes themselves, as every writer of the format lays them out.
TEST(SafetensorsWrite, LayoutIsTheCommonOne) {
  OwnedTensor b = make_tensor(DType::bf16, {2}), a = make_tensor(DType::bf16, {1, 2});
  OwnedTensor f = make_tensor(DType::f32, {1}), u = make_tensor(DType::u8, {3});
  std::memcpy(b.buffer.data(), "bbbb", 4), std::memcpy(a.buffer.data(), "aaaa", 4);
  std::memcpy(f.buffer.data(), "ffff", 4), std::memcpy(u.buffer.data(), "uuu", 3);
  const TempDir dir;
  write_safetensors(dir / "t", {{"b", b.tensor}, {"a", a.tensor}, {"z", f.tensor}, {"u", u.tensor}},
                    {{"format", "pt"}});
  const std::string header = R"({"__metadata__":{"format":"pt"},)"
                             R"("z":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                             R"("a":{"dtype":"BF16","shape":[1,2],"data_offsets":[4,8]},)"
                             R"("b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},)"
                             R"("u":{"dtype":"U8","shape":[3],"data_offsets":[12,15]}})";
  const size_t padded = (header.size() + 7) / 8 * 8;
  ASSERT_NE(header.size(), padded);  // so that the padding is seen
  EXPECT_EQ(read_text_file(dir / "t"), testing::little_endian(padded) + header +
                                           std::string(padded - header.size(), ' ') + "ffffaaaabbbbuuu");
}

TEST(SafetensorsWrite, RefusesWhatCannotBeWritten) {
  const OwnedTensor owner = make_tensor(DType::f32, {4, 4});
  const TempDir dir;
  const std::string path = dir / "t";
  EXPECT_TRUE(fails_with(
      [&] {
        write_safetensors(path, {{"t", owner.tensor.slice(1, 0, 2)}});
      },
      {path, "\"t\"", "contiguous", "[4, 2]"}));
  Tensor elsewhere = owner.tensor;
  elsewhere.device = Device::cuda;
  EXPECT_TRUE(fails_with(
      [&] {
        write_safetensors(path, {{"t", elsewhere}});
      },
      {path, "\"t\"", "found cuda"}));
  EXPECT_TRUE(fails_with([&] { write_safetensors(path, {{"t", Tensor()}}); }, {path, "\"t\"", "no data"}));
  EXPECT_TRUE(fails_with(
      [&] {
        write_safetensors(path, {{"__metadata__", owner.tensor}});
      },
      {path, "__metadata__"}));
  EXPECT_TRUE(fails_with(
      [&] {
        write_safetensors(path, {{"\xff", owner.tensor}});
      },
      {path, "\\xff", "UTF-8"}));
  EXPECT_TRUE(fails_with([&] { write_safetensors(path, {}, {{"k", "\xc3"}}); }, {path, "\\xc3", "UTF-8"}));
  EXPECT_TRUE(dir.names().empty());
}

// What the reader would turn away is not written in the first place.
TEST(SafetensorsWrite, KeepsToTheLimitsOfTheReader) {
  const OwnedTensor owner = make_tensor(DType::u8, {1});
  const TempDir dir;
  std::map<std::string, Tensor> tensors;
  for (size_t i = 0; i < kMaxHeaderNames; ++i) tensors[std::to_string(i)] = owner.tensor;
  EXPECT_TRUE(fails_with(
      [&] {
        write_safetensors(dir / "t", tensors, {{"k", "v"}});
      },
      {dir / "t", "262146 names", "at most 262144"}));
  EXPECT_TRUE(fails_with(
      [&] {
        write_safetensors(dir / "t", {}, {{"k", std::string(kMaxHeaderBytes, 'x')}});
      },
      {dir / "t", "a header of 100000032 bytes", "at most 100000000"}));
  EXPECT_TRUE(dir.names().empty());
  write_safetensors(dir / "t", tensors);
  EXPECT_EQ(SafetensorsFile::open(dir / "t").entries().size(), kMaxHeaderNames);
}

TEST(SafetensorsWrite, FailureNamesThePathAndTheReason) {
  const OwnedTensor owner = make_tensor(DType::f32, {4});
  const TempDir dir;
  EXPECT_TRUE(fails_with(
      [&] {
        write_safetensors(dir / "no/such/t", {{"t", owner.tensor}});
      },
      {dir / "no/such/t", "No such file or directory"}));
  std::filesystem::create_directory(dir / "taken");
  EXPECT_TRUE(fails_with(
      [&] {
        write_safetensors(dir / "taken", {{"t", owner.tensor}});
      },
      {dir / "taken", "rename", "directory"}));
  EXPECT_EQ(dir.names(), std::vector<std::string>{"taken"});
}

// A limit on file sizes stands in for a full disk: write() fails in the middle of the data.
TEST(SafetensorsWrite, FullDiskLeavesTheOldFile) {
  const OwnedTensor small = make_tensor(DType::u8, {16}), large = make_tensor(DType::u8, {1 << 20});
  const TempDir dir;
  const std::string path = dir / "t";
  write_safetensors(path, {{"small", small.tensor}});
  const std::string before = read_text_file(path);

  rlimit old_limit{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{size_t{1} << 16, old_limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  const auto failed = fails_with(
      [&] {
        write_safetensors(path, {{"large", large.tensor}});
      },
      {path, "write to the disk"});
  setrlimit(RLIMIT_FSIZE, &old_limit);
  std::signal(SIGXFSZ, old_handler);

  EXPECT_TRUE(failed);
  EXPECT_EQ(dir.names(), std::vector<std::string>{"t"});
  EXPECT_EQ(read_text_file(path), before);
  write_safetensors(path, {{"large", large.tensor}});  // now there is room: replaces the old file
  EXPECT_NE(SafetensorsFile::open(path).find("large"), nullptr);
}

TEST(AtomicFile, AppearsOnlyWithCommit) {
  const TempDir dir;
  {
    AtomicFile file(dir / "f");
    file.write("half", 4);
    EXPECT_FALSE(file_exists(dir / "f"));
    EXPECT_EQ(dir.names().size(), 1u);  // the temporary file, in the same folder
  }
  EXPECT_TRUE(dir.names().empty());
  AtomicFile file(dir / "f");
  file.write("who", 3), file.write("le", 2);
  file.commit();
  EXPECT_EQ(dir.names(), std::vector<std::string>{"f"});
  EXPECT_EQ(read_text_file(dir / "f"), "whole");
}

TEST(AtomicFile, ReplacesALinkAndNotItsTarget) {
  const TempDir dir;
  testing::write_file(dir / "target", "kept");
  std::filesystem::create_symlink(dir / "target", dir / "link");
  AtomicFile file(dir / "link");
  file.write("new", 3);
  file.commit();
  EXPECT_EQ(read_text_file(dir / "target"), "kept");
  EXPECT_EQ(read_text_file(dir / "link"), "new");
  EXPECT_FALSE(std::filesystem::is_symlink(dir / "link"));
}

}  // namespace
}  // namespace kl
