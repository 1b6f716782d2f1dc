// What a CPU build of torch lacks to trace fake CUDA tensors: somebody who answers for the device.
// Without a guard, indexing says "not linked with support for cuda devices"; without hooks, backward finds no device.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

// It guards nothing. With no device to count, autograd starts no thread of its own for CUDA: backward then runs in the
// thread that called it, where the counting sees it.
struct IdleGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }
};
C10_REGISTER_GUARD_IMPL(CUDA, IdleGuard)

// Torch looks for a class of exactly this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs /*unused*/) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex /*unused*/) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  at::DeviceIndex current_device() const override { return 0; }
};
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}
