// The Python module of a native library. It includes no torch header and so compiles quickly.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#define MARGINOPS_QUOTE(...) #__VA_ARGS__
#define MARGINOPS_TEXT(...) MARGINOPS_QUOTE(__VA_ARGS__)

namespace py = pybind11;

namespace {

// The loader searches the file of a library for this text. It tells what the library was built for
// without loading it. The attribute keeps the text in one piece: optimised code may store a string
// in parts.
__attribute__((used)) constexpr char kBuiltFor[] =
    "marginops kernels built for torch=" MARGINOPS_TEXT(MARGINOPS_TORCH) " sources=" MARGINOPS_TEXT(
        MARGINOPS_SOURCES) " archs=" MARGINOPS_TEXT(MARGINOPS_ARCHS) ";";

py::list split(const std::string& text) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    parts.append(part);
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = MARGINOPS_TEXT(MARGINOPS_VERSION);
  info["built_for"] = MARGINOPS_TEXT(MARGINOPS_DEVICE);
  info["torch"] = MARGINOPS_TEXT(MARGINOPS_TORCH);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["instruction_set"] = MARGINOPS_TEXT(MARGINOPS_INSTRUCTION_SET);
  info["cuda_archs"] = split(MARGINOPS_TEXT(MARGINOPS_ARCHS));
  info["pybind11"] = MARGINOPS_TEXT(PYBIND11_VERSION_MAJOR.PYBIND11_VERSION_MINOR);
  info["sources"] = MARGINOPS_TEXT(MARGINOPS_SOURCES);
  info["families"] = split(MARGINOPS_TEXT(MARGINOPS_FAMILIES));
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = kBuiltFor;
  module.def("build_info", &build_info, "What this library was built from and for.");
}
