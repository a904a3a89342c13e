// Memory as the system gives it: a page of it becomes resident when something is written there.

#include "native/threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxinfer {
namespace {

ffi::Error leave(ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

}  // namespace
}  // namespace jaxinfer

JAXINFER_EXPORT(jaxinfer_untouched);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_untouched, jaxinfer::leave,
                              ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());
