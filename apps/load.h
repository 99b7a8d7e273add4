// From the command line's model options to a loaded engine and tokenizer.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "commands.h"
#include "engine/engine.h"
#include "text/tokenizer.h"

namespace kl::app {

// `-m` resolved with this process's environment.
std::string model_directory(const std::string& model);
void choose_isa(const std::string& name);  // "": nothing is forced
Model open_model(const ModelOptions&);
EngineOptions engine_options(const ModelOptions&);
std::unique_ptr<Engine> open_engine(const ModelOptions&);
// For commands that compute without an engine.
ThreadPool make_pool(const ModelOptions&);

// The tokenizer of a directory; nullopt if the directory has none.
std::optional<Tokenizer> find_tokenizer(const std::string& directory, int vocab_size);
// The same, but it must be there.
Tokenizer need_tokenizer(const std::string& directory, int vocab_size);

// Command line over generation_config.json over our defaults (temperature 0.6, as Moonshot advises for its K2
// family).
SampleParams sample_params(const SamplingOptions&, const std::string& directory);
// Tokens that end an answer: those of generation_config.json and config.json, and <|im_end|>, [EOS], [EOT].
std::vector<int32_t> stop_ids(const Model&, const Tokenizer*);

}  // namespace kl::app
