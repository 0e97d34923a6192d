// RegisterCustomOps: where ONNX Runtime finds our kernels for the op set ai.sbedge.
#include <cstring>
#include <thread>

#include "ort_mixers.h"
#include "ort_spikes.h"

namespace sbedge {
namespace ort {
namespace {

constexpr char DOMAIN[] = "ai.sbedge";
constexpr int64_t MAX_THREADS = 1024;

struct Registered {
    Registration registration;
    Op ops[11] = {make_op<SpikeEncode>(&registration),
                  make_op<SpikeLinears<Int8Weight, 1>>(&registration),
                  make_op<SpikeLinears<Int8Weight, 2>>(&registration),
                  make_op<SpikeLinears<Int8Weight, 3>>(&registration),
                  make_op<SpikeLinears<Int4Weight, 1>>(&registration),
                  make_op<SpikeLinears<Int4Weight, 2>>(&registration),
                  make_op<SpikeLinears<Int4Weight, 3>>(&registration),
                  make_op<GatedLinearAttention>(&registration),
                  make_op<RotaryAngles>(&registration),
                  make_op<SlidingWindowAttention>(&registration),
                  make_op<SpikingWindowAttention>(&registration)};
    Registered* next = nullptr;
};

std::atomic<Registered*> newest{nullptr};  // of a list that only grows

// A whole number that the session options hold for `key`, or `absent`.
Status* read_option(const Api& api, const SessionOptions* options, const char* key, int64_t absent, int64_t* value) {
    int found = 0;
    char text[32] = {};
    size_t size = sizeof(text);
    *value = absent;
    if (Status* status = api(HasSessionConfigEntry, options, key, &found)) return status;
    if (!found) return nullptr;
    if (Status* status = api(GetSessionConfigEntry, options, key, static_cast<char*>(text), &size)) return status;
    char* end = text;
    *value = std::strtoll(text, &end, 10);
    if (end != text && !*end && *value >= 0) return nullptr;
    char message[120];
    std::snprintf(message, sizeof(message), "session option %s is '%s', expected a whole number", key, text);
    return api(CreateStatus, INVALID_ARGUMENT, static_cast<const char*>(message));
}

Status* add_ops(const Api& api, SessionOptions* options, Registered* made) {
    CustomOpDomain* domain = nullptr;   // lives as long as the process, like the ops in it
    Status* status = api(CreateCustomOpDomain, static_cast<const char*>(DOMAIN), &domain);
    for (const Op& op : made->ops)
        if (!status) status = api(CustomOpDomain_Add, domain, static_cast<const CustomOp*>(&op));
    return status ? status : api(AddCustomOpDomain, options, domain);
}

Status* register_ops(SessionOptions* options, const ApiBase* base) {
    const Api api(base->GetApi(API_VERSION));
    if (!api) {
        char message[160];
        std::snprintf(message, sizeof(message), "libsbedge needs onnxruntime 1.%u or newer, found %s", API_VERSION,
                      base->GetVersionString());
        // Creating a status has been the table's first entry since its first version.
        if (const Api oldest{base->GetApi(1)}) return oldest(CreateStatus, NOT_IMPLEMENTED, (const char*)message);
        std::fprintf(stderr, "%s\n", message);
        std::abort();       // no way to tell the caller, who would go on as if the ops were there
    }
    auto* made = new (std::nothrow) Registered;
    if (!made) return api(CreateStatus, FAIL, "libsbedge: no memory");
    Registration& own = made->registration;
    own.api = api;
    int64_t threads = 0;
    Status* status = read_option(api, options, "ai.sbedge.threads", std::thread::hardware_concurrency(), &threads);
    if (!status) status = read_option(api, options, "ai.sbedge.id", 0, &own.id);
    own.threads = static_cast<int>(threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads);
    if (!status) status = add_ops(api, options, made);
    made->next = newest.load();
    while (!newest.compare_exchange_weak(made->next, made)) {}
    return status;
}

}  // namespace
}  // namespace ort
}  // namespace sbedge

extern "C" {

SBEDGE_API sbedge::ort::Status* RegisterCustomOps(sbedge::ort::SessionOptions* options,
                                                  const sbedge::ort::ApiBase* base) {
    return sbedge::ort::register_ops(options, base);
}

int sbedge_ort_traffic(int64_t id, int64_t* fetched, int64_t* dense) {
    for (const auto* made = sbedge::ort::newest.load(); made; made = made->next) {
        if (made->registration.id != id) continue;
        *fetched = made->registration.fetched.load();
        *dense = made->registration.dense.load();
        return 0;
    }
    return -1;
}

}  // extern "C"
