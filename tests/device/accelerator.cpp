// A device of type PrivateUse1 whose memory is the host's and whose arithmetic is the CPU's.
//
// What a GPU asks of a program and a CPU does not: tensors of two devices do not mix, hooks of a backward pass run in a
// thread of the device's own, generators belong to a device, and reading a value on the host waits for the device. Here
// the first is an error, and the last is counted. Results are those of the CPU, to the bit.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/NativeFunctions.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(TYPE, 0);

std::mutex guard;
std::map<std::string, int64_t> waits;  // by operation: how often the host waited for the device
thread_local bool inside = false;      // what runs is the stand-in for a kernel

struct Inside {
  const bool before = inside;
  Inside() { inside = true; }
  ~Inside() { inside = before; }
};

void wait_for(const std::string& why) {
  if (inside) return;
  std::lock_guard<std::mutex> lock(guard);
  ++waits[why];
}

bool here(const at::Tensor& t) { return t.defined() && t.device().type() == TYPE; }

// Random numbers: the CPU's, by a generator that says that it is the device's.

struct Numbers final : c10::GeneratorImpl {
  at::Generator host;
  explicit Numbers(at::Generator g)
      : c10::GeneratorImpl(DEVICE, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), host(std::move(g)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new Numbers(host.clone()); }
};

// Memory.

void release(void* data) { std::free(data); }

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &release, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};

Memory memory;
REGISTER_ALLOCATOR(TYPE, &memory);

// The same memory, seen from the host.
at::Tensor on_host(const at::Tensor& t) {
  if (!here(t)) return t;
  auto storage = t.storage();
  auto* data = static_cast<char*>(storage.mutable_data()) + t.storage_offset() * t.element_size();
  auto options = t.options().device(c10::kCPU).requires_grad(false);
  return at::from_blob(data, t.sizes(), t.strides(), [storage](void*) {}, options);
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (here(from) && !here(to) && !non_blocking) wait_for("copy to the host");
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& t) {
  wait_for("item");
  return on_host(t).item();
}

const at::Tensor& resize(const at::Tensor& t, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  if (t.sizes() == size) return t;  // whatever its strides are
  int64_t count = 1;
  for (auto n : size) count *= n;
  auto bytes = static_cast<size_t>((t.storage_offset() + count) * t.element_size());
  auto storage = t.storage();
  if (bytes > storage.nbytes()) {
    auto data = memory.allocate(bytes);
    std::memcpy(data.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr(std::move(data));
    storage.set_nbytes(bytes);
  }
  t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return t;
}

// Kernels: the CPU's, on the same memory, once it is clear that a device could run them.

// Operations of which CUDA takes tensors of both kinds, beside numbers as tensors of no dimension.
const std::set<std::string> MIXED = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_", "aten::copy_"};

// Operations of which the host has to know the result before it goes on: its shape, or whether it succeeded.
const std::set<std::string> WAITING = {
    "aten::nonzero",      "aten::masked_select", "aten::equal",       "aten::_unique2",           "aten::unique_dim",
    "aten::_linalg_eigh", "aten::_linalg_eig",   "aten::_linalg_svd", "aten::repeat_interleave", "aten::bincount",
};

void check(const std::string& name, const std::vector<at::Tensor>& given) {
  if (MIXED.count(name)) return;
  for (const auto& t : given) {
    TORCH_CHECK(!t.defined() || here(t) || t.dim() == 0, name, ": a tensor of shape ", t.sizes(), " is on the CPU, others on the device");
  }
}

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const auto count = op.schema().arguments().size();
  auto arguments = torch::jit::last(stack, count);
  std::vector<at::Tensor> given;
  for (const auto& value : arguments) {
    if (value.isTensor() && value.toTensor().defined()) {
      given.push_back(value.toTensor());
    } else if (value.isTensorList()) {
      for (const auto& t : value.toTensorVector()) given.push_back(t);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList()) {
        if (t.has_value() && t->defined()) given.push_back(*t);
      }
    }
  }
  check(c10::toString(op.operator_name()), given);
  if (WAITING.count(name)) wait_for(name);
  for (const auto& t : given) {
    if (name == "aten::index" && t.scalar_type() == at::kBool) wait_for("index by a mask");
  }
  for (auto i = stack->size() - count; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (!value.isGenerator()) continue;
    auto* numbers = dynamic_cast<Numbers*>(value.toGenerator().unsafeGetGeneratorImpl());
    TORCH_CHECK(numbers, name, ": a generator of the CPU for tensors of the device");
    value = numbers->host;
  }
  Inside kernel;
  at::native::cpu_fallback(op, stack);
}

at::Tensor on_device(const at::Tensor& t) { return t.defined() ? t.to(DEVICE) : t; }

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                       bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  check("convolution", bias ? std::vector<at::Tensor>{x, weight, *bias} : std::vector<at::Tensor>{x, weight});
  Inside kernel;
  return on_device(at::convolution_symint(on_host(x), on_host(weight), bias ? on_host(*bias) : at::Tensor(), stride,
                                          padding, dilation, transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  check("convolution_backward", {gradient, x, weight});
  Inside kernel;
  const std::vector<c10::SymInt> bias = {transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  auto [a, b, c] = at::convolution_backward_symint(on_host(gradient), on_host(x), on_host(weight), bias, stride, padding,
                                                   dilation, transposed, output_padding, groups, wanted);
  return {on_device(a), on_device(b), on_device(c)};
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator common = at::make_generator<Numbers>(at::detail::getDefaultCPUGenerator());
    return common;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Numbers>(at::detail::createCPUGenerator());
  }
  at::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = memory.allocate(bytes);
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    const_cast<c10::Storage&>(storage).set_data_ptr(std::move(data));
    const_cast<c10::Storage&>(storage).set_nbytes(bytes);
  }
};

Hooks hooks;

// One stream, in which everything is done at once.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<TYPE> {
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("resize_", &resize);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Storage", TORCH_FN(at::native::set_));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
}

// Mixed precision, by CUDA's lists of operations.

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FP32)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("waits", [] {
    std::lock_guard<std::mutex> lock(guard);
    auto found = waits;
    waits.clear();
    return found;
  });
}
