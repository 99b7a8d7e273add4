#include "base/check.h"

namespace kl::detail {

void fail(const std::string& message) { throw Error(message); }

}  // namespace kl::detail
