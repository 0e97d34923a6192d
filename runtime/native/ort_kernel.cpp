#include "ort_kernel.h"

#include <cstdarg>

namespace sbedge {
namespace ort {

constexpr size_t MESSAGE = 300;
constexpr size_t CACHE_LINE = 64;

void Shape::print(char* text, size_t size) const {
    int used = std::snprintf(text, size, "[");
    for (int i = 0; i < rank && used < static_cast<int>(size); ++i) {
        const char* comma = i ? ", " : "";
        used += dims[i] == ANY ? std::snprintf(text + used, size - used, "%sany", comma)
                               : std::snprintf(text + used, size - used, "%s%lld", comma, (long long)dims[i]);
    }
    if (used < static_cast<int>(size)) std::snprintf(text + used, size - used, "]");
}

// --- errors --------------------------------------------------------------------------------------------------------

void Checked::fail(const char* format, ...) {
    if (status_) return;
    char what[MESSAGE], message[MESSAGE + 100];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(what, sizeof(what), format, arguments);
    va_end(arguments);
    std::snprintf(message, sizeof(message), "ai.sbedge %s: %s", op_, what);
    status_ = api_(CreateStatus, INVALID_ARGUMENT, message);
}

void Checked::expect(const Tensor& tensor, const char* name, Shape wanted) {
    if (failed() || tensor.shape.fits(wanted)) return;
    char found[100], expected[100];
    tensor.shape.print(found, sizeof(found));
    wanted.print(expected, sizeof(expected));
    fail("%s is %s, expected %s", name, found, expected);
}

Tensor Checked::tensor(const Value* value) {
    Tensor tensor;
    TensorInfo* info = nullptr;
    size_t rank = 0;
    if (failed()) return tensor;
    if (!value) {
        fail("an input is missing");
        return tensor;
    }
    tensor.value = value;
    passed(api_(GetTensorMutableData, const_cast<Value*>(value), &tensor.data));
    if (failed() || !passed(api_(GetTensorTypeAndShape, value, &info))) return tensor;
    if (passed(api_(GetDimensionsCount, info, &rank))) {
        if (rank > MAX_RANK) fail("an input has %zu dimensions, expected at most %d", rank, MAX_RANK);
        else passed(api_(GetDimensions, info, tensor.shape.dims, rank));
        tensor.shape.rank = static_cast<int>(rank);
    }
    api_(ReleaseTensorTypeAndShapeInfo, info);
    return tensor;
}

// --- nodes ---------------------------------------------------------------------------------------------------------

float Construction::real(const char* attribute) {
    float value = 0;
    if (!failed()) passed(api_(KernelInfoGetAttribute_float, info_, attribute, &value));
    return value;
}

float Construction::real(const char* attribute, float absent) {
    float value = absent;
    Status* status = api_(KernelInfoGetAttribute_float, info_, attribute, &value);
    if (!status) return value;
    api_(ReleaseStatus, status);
    return absent;
}

int64_t Construction::whole(const char* attribute, int64_t low, int64_t high) {
    int64_t value = low;
    if (failed() || !passed(api_(KernelInfoGetAttribute_int64, info_, attribute, &value))) return low;
    if (value >= low && value <= high) return value;
    fail("%s is %lld, expected %lld to %lld", attribute, (long long)value, (long long)low, (long long)high);
    return low;
}

Tensor Construction::constant(size_t index) {
    int is_constant = 0;
    const Value* value = nullptr;
    if (failed() || !passed(api_(KernelInfoGetConstantInput_tensor, info_, index, &is_constant, &value))) return {};
    return is_constant ? tensor(value) : Tensor();
}

Tensor Run::input(size_t index) {
    const Value* value = nullptr;
    if (failed() || !passed(api_(KernelContext_GetInput, context_, index, &value))) return {};
    return tensor(value);
}

void* Run::data(size_t index) {
    const Value* value = nullptr;
    void* data = nullptr;
    if (!failed() && passed(api_(KernelContext_GetInput, context_, index, &value)))
        passed(api_(GetTensorMutableData, const_cast<Value*>(value), &data));
    return data;
}

void* Run::output(size_t index, const Shape& shape) {
    Value* value = nullptr;
    void* data = nullptr;
    if (failed()) return nullptr;
    if (passed(api_(KernelContext_GetOutput, context_, index, shape.dims, static_cast<size_t>(shape.rank), &value)))
        passed(api_(GetTensorMutableData, value, &data));
    return data;
}

// --- scratch -------------------------------------------------------------------------------------------------------

struct alignas(CACHE_LINE) Block {
    size_t bytes;   // that follow
};

static Block* allocate(size_t bytes) {
    void* memory = ::operator new(sizeof(Block) + bytes, std::align_val_t(CACHE_LINE), std::nothrow);
    return memory ? new (memory) Block{bytes} : nullptr;
}

static void release(Block* block) {
    ::operator delete(block, std::align_val_t(CACHE_LINE));
}

Scratch::Loan::Loan(Scratch& owner, size_t bytes, Checked& run) : owner_(owner) {
    if (run.failed()) return;
    for (auto& place : owner.kept_)
        if ((block_ = place.exchange(nullptr, std::memory_order_acquire))) break;
    if (block_ && block_->bytes >= bytes) return;
    release(block_);
    block_ = allocate(bytes);
    if (!block_) run.fail("no memory for %zu bytes", bytes);
}

Scratch::Loan::~Loan() {
    for (auto& place : owner_.kept_) {
        Block* empty = nullptr;
        if (!block_ || place.compare_exchange_strong(empty, block_, std::memory_order_release)) return;
    }
    release(block_);
}

void* Scratch::Loan::memory() const { return block_ ? block_ + 1 : nullptr; }

void Scratch::clear() {
    for (auto& place : kept_) release(place.exchange(nullptr, std::memory_order_acquire));
}

}  // namespace ort
}  // namespace sbedge
