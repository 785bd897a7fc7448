// The names of a library's kernels by their addresses, from its own table of symbols: kernels are known by a name that ends
// in _kernel.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <map>
#include <string>
#include <vector>

namespace emulator {

// Returns "step_kernel<float, 4>" of a function's whole name, or "" where that is no kernel.
inline std::string kernel_name(const std::string& symbol) {
  int status = 0;
  char* text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  const std::string whole = text ? text : "";
  std::free(text);
  const size_t end = whole.find("_kernel");
  const size_t after = end + 7;
  if (end == std::string::npos || after >= whole.size() || (whole[after] != '<' && whole[after] != '(')) return "";
  size_t begin = whole.find_last_of(": ", end);
  begin = begin == std::string::npos ? 0 : begin + 1;
  size_t close = after;
  if (whole[after] == '<') {
    for (int depth = 0; close < whole.size(); ++close) {
      depth += (whole[close] == '<') - (whole[close] == '>');
      if (depth == 0) break;
    }
    ++close;
  }
  std::string name = whole.substr(begin, close - begin);
  for (size_t at; (at = name.find("torch_influence::")) != std::string::npos;) name.erase(at, 17);
  return name;
}

// Reads the kernels of the library that holds `address`.
inline std::map<const void*, std::string> kernels_of_library(const void* address) {
  std::map<const void*, std::string> kernels;
  Dl_info library;
  if (!dladdr(address, &library)) return kernels;
  std::ifstream file(library.dli_fname, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(bytes.data() + sections[i].sh_offset);
    const char* names = bytes.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t j = 0; j < sections[i].sh_size / sizeof(Elf64_Sym); ++j) {
      if (ELF64_ST_TYPE(symbols[j].st_info) != STT_FUNC || symbols[j].st_shndx == SHN_UNDEF) continue;
      const std::string symbol = names + symbols[j].st_name;
      if (symbol.find('.') != std::string::npos) continue;  // a part that the compiler has split off
      const std::string name = kernel_name(symbol);
      if (!name.empty()) kernels[static_cast<const char*>(library.dli_fbase) + symbols[j].st_value] = name;
    }
  }
  return kernels;
}

}  // namespace emulator
