#include "kernels.h"

namespace iol {
namespace IOL_ISA {

#define IOL_ENTRY(name, parameters, arguments) name,
const iol_kernels kernels = {read_memory, multiply_int8, IOL_ENTRIES(IOL_ENTRY)};
#undef IOL_ENTRY

}  // namespace IOL_ISA
}  // namespace iol
