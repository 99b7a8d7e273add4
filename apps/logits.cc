// kimi-linear logits: token ids -> a safetensors file that any other implementation can be compared with.
#include <map>

#include "commands.h"
#include "load.h"
#include "terminal.h"

namespace kl::app {

int logits(const LogitsOptions& options) {
  KL_CHECK(options.ids.empty() != options.ids_file.empty(),
           "give the token ids either with --ids or with --ids-file");
  const std::vector<int32_t> ids =
      parse_ids(options.ids.empty() ? read_text_file(options.ids_file, size_t{1} << 30) : options.ids);
  KL_CHECK(!ids.empty(), "no token ids were given");
  const Model model = open_model(options.model);
  const Config& c = model.config;
  const auto T = static_cast<int64_t>(ids.size());
  const DType latent = options.model.cache_type == "bf16" ? DType::bf16 : DType::f32;

  std::vector<OwnedTensor> owned;  // logits, then hidden.0 ... hidden.L
  owned.push_back(make_tensor(DType::f32, {T, c.vocab_size}));
  for (int i = 0; options.hidden && i <= c.num_hidden_layers; ++i)
    owned.push_back(make_tensor(DType::f32, {T, c.hidden_size}));
  const auto store = [](const Tensor& rows, const OwnedTensor& into, int64_t first) {
    std::copy_n(rows.ptr<float>(), rows.numel(), into.tensor.at<float>(first));
  };

  ThreadPool pool = make_pool(options.model);
  const PinnedCaller pinned(pool);
  Ctx ctx;
  ctx.pool = &pool;
  Arena arena;
  State state(c, {.max_tokens = T, .latent_dtype = latent});
  const int slot = state.open();
  Progress progress("computing", "tokens");
  for (int64_t first = 0; first < T; first += options.model.batch) {
    KL_CHECK(!interrupted, "interrupted");
    const int64_t n = std::min<int64_t>(options.model.batch, T - first);
    Batch batch;
    batch.add(slot, std::span(ids).subspan(static_cast<size_t>(first), static_cast<size_t>(n)),
              Batch::Logits::all);
    ForwardOptions forward_options;
    if (options.hidden) {
      forward_options.on_hidden = [&](int i, const Tensor& h) {
        store(h, owned[static_cast<size_t>(i) + 1], first);
      };
    }
    store(forward(ctx, model, batch, state, arena, forward_options), owned[0], first);
    progress.update(static_cast<double>(first + n), static_cast<double>(T));
  }

  std::map<std::string, Tensor> tensors = {{"logits", owned[0].tensor}};
  for (size_t i = 1; i < owned.size(); ++i) tensors["hidden." + std::to_string(i - 1)] = owned[i].tensor;
  write_safetensors(options.output, tensors, {{"format", "pt"}});
  note(cat("wrote ", options.output, ": ", tensors.size(), " tensors of ", T, " tokens"));
  return 0;
}

}  // namespace kl::app
