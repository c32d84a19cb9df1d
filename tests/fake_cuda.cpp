// Lets a PyTorch without CUDA make fake tensors of CUDA devices that autograd takes: a device guard that does nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
