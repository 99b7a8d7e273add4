#include "model/model.h"

namespace kl {

Model load_model(const std::string& directory, const LoadProgress& on_layer) {
  Model m;
  m.config = load_config(directory);  // first: its errors say more than those of the tensors
  m.checkpoint = Checkpoint::open(directory);
  m.weights = load_weights(m.checkpoint, m.config, on_layer);
  return m;
}

}  // namespace kl
