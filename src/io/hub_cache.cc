// Where a model lies (resolve_model of checkpoint.h). The Hugging Face cache keeps one folder per repository:
//
//   models--org--name/refs/main                    the commit that was asked for as "main"
//   models--org--name/snapshots/<commit>/...       links to models--org--name/blobs/
//
// Ids come from users and requests, refs from files: neither may lead out of the cache.
#include <algorithm>
#include <filesystem>

#include "io/checkpoint.h"
#include "io/quote.h"

namespace kl {

namespace {

namespace fs = std::filesystem;

bool is_directory(const std::string& path) {
  std::error_code ignored;
  return fs::is_directory(path, ignored);
}

bool is_id_character(char c) {
  return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '-' || c == '_' ||
         c == '.';
}

// The rules of the hub for one half of an id. "--" would make two ids share one folder.
bool is_id_part(std::string_view part) {
  return !part.empty() && part.size() <= 96 && std::all_of(part.begin(), part.end(), is_id_character) &&
         part.front() != '.' && part.front() != '-' && part.back() != '.' && part.back() != '-' &&
         part.find("..") == part.npos && part.find("--") == part.npos;
}

// "org/name" -> "models--org--name"; empty for what is not an id.
std::string repository_folder(std::string_view id) {
  const size_t slash = id.find('/');
  if (slash == id.npos) return is_id_part(id) ? cat("models--", id) : "";
  const std::string_view org = id.substr(0, slash), name = id.substr(slash + 1);
  return is_id_part(org) && is_id_part(name) ? cat("models--", org, "--", name) : "";
}

std::string hub_folder(const HubLocations& locations) {
  const auto expanded = [&](const std::string& path) {  // "~/..." in a variable reaches a program as it is
    return path.rfind("~/", 0) == 0 && !locations.user_home.empty() ? locations.user_home + path.substr(1)
                                                                    : path;
  };
  if (!locations.hub_cache.empty()) return expanded(locations.hub_cache);
  if (!locations.home.empty()) return expanded(locations.home) + "/hub";
  return locations.user_home.empty() ? "" : locations.user_home + "/.cache/huggingface/hub";
}

// What refs/main holds: a commit, which becomes part of a path.
std::string main_commit(const std::string& ref) {
  std::string commit = read_text_file(ref, 1024);
  while (!commit.empty() && (commit.back() == '\n' || commit.back() == '\r' || commit.back() == ' ')) {
    commit.pop_back();
  }
  KL_CHECK(!commit.empty() && std::all_of(commit.begin(), commit.end(), is_id_character) && commit[0] != '.',
           ref, ": expected the name of a commit, found ", in_quotes(commit));
  return commit;
}

std::string snapshot_of(const std::string& repository) {
  const std::string snapshots = repository + "/snapshots/", ref = repository + "/refs/main";
  if (file_exists(ref)) {
    const std::string snapshot = snapshots + main_commit(ref);
    KL_CHECK(is_directory(snapshot), ref, " names a snapshot that is not in the cache: expected ", snapshot);
    return snapshot;
  }
  std::vector<std::string> found;
  std::error_code problem;
  fs::directory_iterator it(snapshots, problem);
  for (; !problem && it != fs::directory_iterator(); it.increment(problem)) {
    if (is_directory(it->path().string())) found.push_back(it->path().filename().string());
  }
  KL_CHECK(!problem, "cannot read ", snapshots, ": ", problem.message());
  std::sort(found.begin(), found.end());
  std::string list;
  for (const std::string& name : found) list += (list.empty() ? "" : ", ") + printable(name);
  KL_CHECK(found.size() == 1, repository, ": without refs/main expected exactly one snapshot, found ",
           found.empty() ? "none" : list);
  return snapshots + found[0];
}

}  // namespace

std::string resolve_model(const std::string& directory_or_id, const HubLocations& locations) {
  KL_CHECK(!directory_or_id.empty(), "expected a model directory or an id org/name, found an empty name");
  if (file_exists(directory_or_id + "/config.json")) return directory_or_id;
  if (is_directory(directory_or_id + "/snapshots")) return snapshot_of(directory_or_id);

  const std::string hub = hub_folder(locations), folder = repository_folder(directory_or_id);
  const std::string repository = hub + "/" + folder;
  if (!hub.empty() && !folder.empty() && is_directory(repository)) return snapshot_of(repository);

  const std::string here =
      is_directory(directory_or_id) ? "it is a directory without a config.json" : "it is not a directory";
  const std::string there = folder.empty() ? "it is not a repository id of the form org/name"
                            : hub.empty() ? "there is no Hugging Face cache, since HF_HUB_CACHE, HF_HOME and "
                                            "HOME are all unset"
                                          : "there is no " + repository + " in the Hugging Face cache";
  detail::fail(cat("cannot find the model ", in_quotes(directory_or_id), ": ", here, ", and ", there));
}

}  // namespace kl
