// moba_ext._C: what is not an op. Without torch, so that it also works to say why an op is missing.

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "cpu/isa.h"
#include "plan.h"

namespace py = pybind11;

namespace {

// "a b" -> ["a", "b"]; "" -> []
py::list split(const std::string& joined) {
  py::list parts;
  std::istringstream stream(joined);
  for (std::string part; stream >> part;) parts.append(part);
  return parts;
}

py::dict build_info() {
  const std::string cuda_version = MOBA_CUDA_VERSION;
  py::dict info;
  info["version"] = MOBA_VERSION;
  info["libraries"] = split(MOBA_LIBRARIES);
  info["cxx_compiler"] = MOBA_CXX;
  info["build_type"] = MOBA_BUILD_TYPE;
  info["torch_target"] = MOBA_TORCH_TARGET;
  info["cpu_isas"] = split(MOBA_ISAS);
  info["cuda_toolkit"] = cuda_version.empty() ? py::object(py::none()) : py::str(cuda_version);
  info["cuda_archs"] = split(MOBA_CUDA_ARCHS);
  return info;
}

// The CPU backend's plan of a call; element_size 4 for float32, 2 for the 16-bit dtypes.
py::dict plan(int64_t batch, int64_t tokens_q, int64_t tokens_k, int64_t max_seqlen_k,
              int64_t heads_q, int64_t heads_k, int64_t head_dim, int64_t block_size, int64_t topk,
              int64_t element_size, int64_t threads) {
  const moba::DType dtype = element_size == 4 ? moba::DType::kFloat32 : moba::DType::kBFloat16;
  const moba::CpuPlan planned = moba::plan_cpu({dtype, batch, tokens_q, tokens_k, max_seqlen_k,
                                                heads_q, heads_k, head_dim, block_size, topk},
                                               threads);
  py::dict sizes;
  sizes["dense"] = planned.dense;
  sizes["forward_bytes"] = planned.forward_bytes;
  sizes["backward_bytes"] = planned.backward_bytes;
  sizes["heads_per_group"] = planned.heads_per_group;
  sizes["queries_per_group"] = planned.queries_per_group;
  sizes["groups"] = planned.query_ranges * moba::ceil_div(heads_k, planned.heads_per_group);
  return sizes;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def(
      "build_info", &build_info,
      "How this package was built: version, libraries ('cpu', 'cuda'), cxx_compiler, build_type,\n"
      "torch_target (oldest torch the libraries load under), cpu_isas (instruction-set levels of\n"
      "the CPU kernels), cuda_toolkit (None without the CUDA library), cuda_archs.");
  module.def("cpu_isa", &moba::cpu_isa,
             "Instruction-set level of the CPU kernels on this machine: the widest one, or what "
             "the environment\n"
             "variable MOBA_CPU_ISA names. RuntimeError if that one can't run here.");
  module.def("attended_pairs", &moba::attended_pairs, py::arg("queries"), py::arg("keys"),
             py::arg("block_size"), py::arg("topk"),
             "(query, key) pairs of one sequence and head.");
  module.def("dense_pairs", &moba::dense_pairs, py::arg("queries"), py::arg("keys"),
             "The same for full causal attention.");
  module.def(
      "route_table",
      [](int64_t heads, int64_t entries_of_head, int64_t num_blocks) {
        return moba::route_table(heads, entries_of_head, num_blocks).elements;
      },
      py::arg("heads"), py::arg("entries_of_head"), py::arg("num_blocks"),
      "int32 elements of the CUDA route's table; see csrc/plan.h.");
  module.def("plan", &plan, py::kw_only(), py::arg("batch"), py::arg("tokens_q"),
             py::arg("tokens_k"), py::arg("max_seqlen_k"), py::arg("heads_q"), py::arg("heads_k"),
             py::arg("head_dim"), py::arg("block_size"), py::arg("topk"), py::arg("element_size"),
             py::arg("threads"), "The CPU backend's plan from shapes alone; see moba_ext.plan.");
}
