// The entries of ONNX Runtime's C API that our ops need, and nothing else: no pip package ships its headers.
//
// OrtApi is a table of functions to which releases only append, so an entry keeps its index forever; the indices below
// are its place in the declaration of `struct OrtApi`. OrtCustomOp grows at its end, too: `version` tells ONNX Runtime
// how far it may read. Everything here has been there since API version 17 (onnxruntime 1.17), which is what we ask for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sbedge {
namespace ort {

constexpr uint32_t API_VERSION = 17;

// Opaque objects of ONNX Runtime.
struct Status;  // null means success
struct Value;
struct TensorInfo;      // OrtTensorTypeAndShapeInfo
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;      // of a node, when its kernel is created
struct KernelContext;   // of a node, when it runs

enum ErrorCode : int { FAIL = 1, INVALID_ARGUMENT = 2, RUNTIME_EXCEPTION = 6, NOT_IMPLEMENTED = 9 };
enum ElementType : int { FLOAT = 1, UINT8 = 2, INT8 = 3, INT64 = 7, FLOAT16 = 10, DOUBLE = 11 };

struct ApiBase {
    const void* const* (*GetApi)(uint32_t version);     // the table; null if this ONNX Runtime is older
    const char* (*GetVersionString)();
};

template <int INDEX, class Function>
struct Entry {};

constexpr Entry<0, Status*(int, const char*)> CreateStatus;
constexpr Entry<26, Status*(const char*, CustomOpDomain**)> CreateCustomOpDomain;
constexpr Entry<27, Status*(CustomOpDomain*, const struct CustomOp*)> CustomOpDomain_Add;
constexpr Entry<28, Status*(SessionOptions*, CustomOpDomain*)> AddCustomOpDomain;
constexpr Entry<51, Status*(Value*, void**)> GetTensorMutableData;
constexpr Entry<61, Status*(const TensorInfo*, size_t*)> GetDimensionsCount;
constexpr Entry<62, Status*(const TensorInfo*, int64_t*, size_t)> GetDimensions;
constexpr Entry<65, Status*(const Value*, TensorInfo**)> GetTensorTypeAndShape;
constexpr Entry<85, Status*(const KernelInfo*, const char*, float*)> KernelInfoGetAttribute_float;
constexpr Entry<86, Status*(const KernelInfo*, const char*, int64_t*)> KernelInfoGetAttribute_int64;
constexpr Entry<90, Status*(const KernelContext*, size_t, const Value**)> KernelContext_GetInput;
constexpr Entry<91, Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)> KernelContext_GetOutput;
constexpr Entry<93, void(Status*)> ReleaseStatus;
constexpr Entry<99, void(TensorInfo*)> ReleaseTensorTypeAndShapeInfo;
constexpr Entry<237, Status*(const SessionOptions*, const char*, int*)> HasSessionConfigEntry;
constexpr Entry<238, Status*(const SessionOptions*, const char*, char*, size_t*)> GetSessionConfigEntry;
constexpr Entry<249, Status*(const KernelInfo*, size_t, int*, const Value**)> KernelInfoGetConstantInput_tensor;
constexpr Entry<274, Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>
    KernelContext_ParallelFor;

// api(CreateStatus, FAIL, "message") calls the entry of that name.
class Api {
public:
    explicit Api(const void* const* table = nullptr) : table_(table) {}
    explicit operator bool() const { return table_; }

    template <int INDEX, class Result, class... Parameters, class... Arguments>
    Result operator()(Entry<INDEX, Result(Parameters...)>, Arguments... arguments) const {
        return reinterpret_cast<Result (*)(Parameters...)>(const_cast<void*>(table_[INDEX]))(arguments...);
    }

private:
    const void* const* table_;
};

// OrtCustomOp as far as API version 17 reads it. Counts and positions of inputs and outputs are size_t.
struct CustomOp {
    uint32_t version;
    void* (*CreateKernel)(const CustomOp*, const void* const* api, const KernelInfo*);  // unused: see CreateKernelV2
    const char* (*GetName)(const CustomOp*);
    const char* (*GetExecutionProviderType)(const CustomOp*);   // null: the CPU
    int (*GetInputType)(const CustomOp*, size_t);
    size_t (*GetInputTypeCount)(const CustomOp*);
    int (*GetOutputType)(const CustomOp*, size_t);
    size_t (*GetOutputTypeCount)(const CustomOp*);
    void (*KernelCompute)(void* kernel, KernelContext*);        // unused: see KernelComputeV2
    void (*KernelDestroy)(void* kernel);
    int (*GetInputCharacteristic)(const CustomOp*, size_t);     // 0: required
    int (*GetOutputCharacteristic)(const CustomOp*, size_t);
    int (*GetInputMemoryType)(const CustomOp*, size_t);         // 0: the provider's own
    int (*GetVariadicInputMinArity)(const CustomOp*);
    int (*GetVariadicInputHomogeneity)(const CustomOp*);
    int (*GetVariadicOutputMinArity)(const CustomOp*);
    int (*GetVariadicOutputHomogeneity)(const CustomOp*);
    Status* (*CreateKernelV2)(const CustomOp*, const void* const* api, const KernelInfo*, void** kernel);
    Status* (*KernelComputeV2)(void* kernel, KernelContext*);
    Status* (*InferOutputShapeFn)(const CustomOp*, void* context);     // null: ranks and sizes stay unknown
    int (*GetStartVersion)(const CustomOp*);    // null: from the op set's version 1 on
    int (*GetEndVersion)(const CustomOp*);
};

}  // namespace ort
}  // namespace sbedge
