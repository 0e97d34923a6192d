// What our ONNX Runtime kernels are made of: their inputs and outputs with shapes checked, errors, threads, scratch.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <new>

#include "internal.h"
#include "ort_api.h"

namespace sbedge {
namespace ort {

constexpr int MAX_RANK = 4;
constexpr int64_t ANY = -1;

class Checked;
struct Block;

// Memory for runs, kept from run to run: as many blocks as there were runs at once, each as large as the largest one
// asked for. Lock-free: a run takes a block out of the array and puts it back.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;

    class Loan {
    public:
        Loan(Scratch& owner, size_t bytes, Checked& run);   // no memory if the run has failed, or fails by this
        ~Loan();
        Loan(const Loan&) = delete;
        template <class T>
        T* as() const {
            return static_cast<T*>(memory());
        }

    private:
        void* memory() const;
        Scratch& owner_;
        Block* block_ = nullptr;
    };

    void clear();

private:
    static constexpr int KEPT = 16;
    std::atomic<Block*> kept_[KEPT] = {};
};

// One call of RegisterCustomOps: what its session options ask for, and what its kernels share. Lives as long as the
// process, for the options may make a session at any time; the memory goes with the last kernel.
struct Registration {
    Api api;
    int64_t id = 0;
    int threads = 1;
    std::atomic<int64_t> fetched{0}, dense{0};  // weight bytes of spiking linears: read, and had nothing been silent
    std::atomic<int> kernels{0};
    Scratch scratch;    // one for all nodes: those of a session run one after the other
};

struct Shape {
    int rank = 0;
    int64_t dims[MAX_RANK] = {};

    Shape() = default;
    Shape(std::initializer_list<int64_t> sizes) {
        for (int64_t size : sizes) dims[rank++] = size;
    }
    bool fits(const Shape& wanted) const {
        if (rank != wanted.rank) return false;
        for (int i = 0; i < rank; ++i)
            if (wanted.dims[i] != ANY && dims[i] != wanted.dims[i]) return false;
        return true;
    }
    void print(char* text, size_t size) const;      // "[1, any, 64]"
};

// A tensor of the graph. Its element type was checked against the op's when the model was loaded.
struct Tensor {
    const Value* value = nullptr;
    void* data = nullptr;
    Shape shape;

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
    int64_t size() const {
        int64_t count = 1;
        for (int i = 0; i < shape.rank; ++i) count *= shape.dims[i];
        return count;
    }
};

// Remembers the first thing that went wrong; what is asked for afterwards does nothing.
class Checked {
public:
    Checked(const Api& api, const char* op) : api_(api), op_(op) {}
    Checked(const Checked&) = delete;

    bool failed() const { return status_; }
    Status* status() const { return status_; }      // handed to ONNX Runtime, which releases it

    __attribute__((format(printf, 2, 3))) void fail(const char* format, ...);
    // `tensor` is of a shape, or the message says which input of which op is not.
    void expect(const Tensor& tensor, const char* name, Shape wanted);

protected:
    bool passed(Status* status) {
        if (!status_) status_ = status;
        else if (status) api_(ReleaseStatus, status);
        return !status_;
    }
    Tensor tensor(const Value* value);

    const Api& api_;
    const char* op_;
    Status* status_ = nullptr;
};

// A node when its kernel is created.
class Construction : public Checked {
public:
    Construction(const Registration& registration, const char* op, const KernelInfo* info)
        : Checked(registration.api, op), info_(info) {}

    float real(const char* attribute);
    float real(const char* attribute, float absent);    // for an attribute that older models do not have
    int64_t whole(const char* attribute, int64_t low, int64_t high);
    // An input that never changes; without a value if it is none.
    Tensor constant(size_t index);

private:
    const KernelInfo* info_;
};

// A node when it runs.
class Run : public Checked {
public:
    Run(Registration& registration, const char* op, KernelContext* context)
        : Checked(registration.api, op), registration(registration), context_(context) {}

    Tensor input(size_t index);
    void* data(size_t index);       // of an input whose shape is known
    // The output's memory, which ONNX Runtime has or makes.
    void* output(size_t index, const Shape& shape);
    // f(ith, nth) for every ith below nth, on the session's own threads: at most `most` shares of the work.
    template <class F>
    void parallel(int64_t most, F f);

    Registration& registration;

private:
    KernelContext* context_;
};

template <class F>
void Run::parallel(int64_t most, F f) {
    const int nth = static_cast<int>(most < registration.threads ? most : registration.threads);
    if (failed()) return;
    if (nth <= 1) return f(0, 1);
    struct Work {
        F* f;
        int nth;
    } work{&f, nth};
    const auto call = [](void* data, size_t ith) {
        const Work& work = *static_cast<Work*>(data);
        (*work.f)(static_cast<int>(ith), work.nth);
    };
    passed(api_(KernelContext_ParallelFor, context_, call, static_cast<size_t>(nth), size_t(0), &work));
}

// --- from a kernel class to an OrtCustomOp -------------------------------------------------------------------------

// Types of inputs and outputs, ended by 0.
struct Signature {
    const char* name;
    int inputs[18], outputs[6];
};

struct Op : CustomOp {
    const Signature* signature;
    Registration* registration;
};

inline size_t count(const int* types) {
    size_t n = 0;
    while (types[n]) ++n;
    return n;
}

// Kernel has: static constexpr Signature signature; void create(Construction&); void run(Run&) (on several threads at
// once; whatever it keeps must bear that).
template <class Kernel>
Op make_op(Registration* registration) {
    struct Node {
        Registration* registration;
        Kernel kernel;
        explicit Node(Registration* registration) : registration(registration) { ++registration->kernels; }
        ~Node() {
            if (--registration->kernels == 0) registration->scratch.clear();
        }
    };
    static const auto self = [](const CustomOp* op) { return static_cast<const Op*>(op); };
    Op op{};
    op.version = API_VERSION;
    op.signature = &Kernel::signature;
    op.registration = registration;
    op.GetName = [](const CustomOp* op) { return self(op)->signature->name; };
    op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
    op.GetInputType = [](const CustomOp* op, size_t i) { return self(op)->signature->inputs[i]; };
    op.GetInputTypeCount = [](const CustomOp* op) { return count(self(op)->signature->inputs); };
    op.GetOutputType = [](const CustomOp* op, size_t i) { return self(op)->signature->outputs[i]; };
    op.GetOutputTypeCount = [](const CustomOp* op) { return count(self(op)->signature->outputs); };
    op.GetInputCharacteristic = op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return 0; };
    op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
    op.CreateKernelV2 = [](const CustomOp* op, const void* const*, const KernelInfo* info, void** out) -> Status* {
        const Op* own = self(op);
        Construction node(*own->registration, own->signature->name, info);
        auto* made = new (std::nothrow) Node(own->registration);
        if (made) made->kernel.create(node);
        else node.fail("no memory");
        if (node.failed()) delete made;
        else *out = made;
        return node.status();
    };
    op.KernelComputeV2 = [](void* kernel, KernelContext* context) -> Status* {
        auto* node = static_cast<Node*>(kernel);
        Run run(*node->registration, Kernel::signature.name, context);
        node->kernel.run(run);
        return run.status();
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
    return op;
}

}  // namespace ort
}  // namespace sbedge
