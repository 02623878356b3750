// Gives files to the loader of control vectors of the patched common/, and says what came of each.
//
//   loader MODEL FILE EVERY < inputs > results
//
// An input is its size (uint32) and its bytes, which are written to FILE and loaded. What loads and has the
// width of the model, every EVERYth time, or any other width, is set on a context too, and decoded under.
// The file common.cpp is compiled in here: the function that sets the vectors is private to it.

#include "allocator.h"
#include "common.h"

#include <sys/time.h>

#include <cstdio>
#include <cstring>

static void count_error(const char * format, ...);

#undef COM_ERR
#define COM_ERR(...) count_error(__VA_ARGS__)
#include "common.cpp"

enum outcome : uint32_t {
    REFUSED     = 0, // by the loader
    LOADED      = 1,
    NOT_SET     = 2, // loaded, and refused by the context
    SET         = 3,
    BROKEN_LOAD = 4, // a vector is not as wide as the rest
    SILENT      = 5, // refused without a reason
    LEFT_TRACES = 6, // after it is refused or cleared, the model is not the one it was
};

struct result {
    uint32_t outcome;
    uint32_t checksum; // of what was loaded
    uint64_t cpu_us;   // of the loading
    uint64_t peak;     // bytes allocated at once, at most, by the loading
};

static constexpr long LIMIT_S = 1; // of CPU time, then SIGPROF ends this process

static int n_errors = 0;

static void count_error(const char * format, ...) {
    char line[512];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    n_errors += line[0] != '\0';
}

static void count_logged_error(ggml_log_level level, const char *, void *) {
    n_errors += level == GGML_LOG_LEVEL_ERROR;
}

static uint64_t allocated = 0;
static uint64_t peak      = 0;

static void on_malloc(const volatile void *, size_t size) {
    allocated += size;
    peak = std::max(peak, allocated);
}

static void on_free(const volatile void * pointer) {
    const size_t size = __sanitizer_get_allocated_size(pointer);
    allocated -= std::min<uint64_t>(allocated, size); // what was allocated before the count began
}

static uint64_t cpu_us() {
    timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec*1000000ull + now.tv_nsec/1000;
}

static uint32_t crc32(uint32_t crc, const void * data, size_t size) {
    crc = ~crc;
    for (size_t i = 0; i < size; ++i) {
        crc ^= ((const uint8_t *) data)[i];
        for (int bit = 0; bit < 8; ++bit) {
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
        }
    }
    return ~crc;
}

static uint32_t checksum(uint32_t crc, const std::map<int, std::vector<float>> & vectors) {
    for (const auto & [il, values] : vectors) {
        const int32_t layer = il;
        crc = crc32(crc, &layer, sizeof(layer));
        crc = crc32(crc, values.data(), values.size()*sizeof(float));
    }
    return crc;
}

static bool is_whole(const common_control_vector_data & loaded) {
    const size_t n_embd = loaded.n_embd;
    bool res = loaded.n_embd > 0 && loaded.add.size() + loaded.remove.size() > 0;
    for (const auto & [il, add] : loaded.add) {
        res = res && il >= 0 && add.size() == n_embd;
    }
    for (const auto & [il, remove] : loaded.remove) {
        res = res && il >= 0 && !remove.empty() && remove.size() % n_embd == 0;
    }
    return res;
}

static std::vector<float> decode(llama_context * ctx) {
    llama_memory_clear(llama_get_memory(ctx), true);
    llama_token tokens[] = { 2, 3, 5 };
    if (llama_decode(ctx, llama_batch_get_one(tokens, 3)) != 0) {
        return {};
    }
    const float * logits = llama_get_logits_ith(ctx, -1);
    return std::vector<float>(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx))));
}

class loader_under_test {
public:
    loader_under_test(llama_context * ctx, const char * file, int every) :
        ctx(ctx), file(file), every(every), n_embd(llama_model_n_embd(llama_get_model(ctx))), unsteered(decode(ctx)) {
        params.control_vectors.push_back({ 1.0f, file });
    }

    result run(const std::vector<char> & input) {
        write(input);
        watch(LIMIT_S);

        result res = {};
        n_errors   = 0;
        allocated  = 0;
        peak       = 0;
        const uint64_t began = cpu_us();
        {
            const auto loaded = common_control_vector_load(params.control_vectors[0]);
            res.cpu_us = cpu_us() - began;
            res.peak   = peak;
            if (loaded.n_embd == -1) {
                res.outcome = n_errors > 0 ? REFUSED : SILENT;
            } else if (!is_whole(loaded)) {
                res.outcome = BROKEN_LOAD;
            } else {
                res.outcome  = LOADED;
                res.checksum = checksum(checksum(0, loaded.add), loaded.remove);
                if (loaded.n_embd != n_embd || ++n_loaded % every == 0) {
                    res.outcome = set();
                }
            }
        }

        watch(0);
        return res;
    }

private:
    uint32_t set() {
        n_errors = 0;
        const bool is_set = common_set_control_vectors(ctx, params);
        if (is_set) {
            decode(ctx);
            llama_set_adapter_edits(ctx, nullptr, 0, n_embd);
        } else if (n_errors == 0) {
            return SILENT;
        }
        // compared as bytes, for which NaN is NaN
        const std::vector<float> after = decode(ctx);
        const bool is_same = after.size() == unsteered.size() && memcmp(after.data(), unsteered.data(), after.size()*sizeof(float)) == 0;
        return !is_same ? LEFT_TRACES : is_set ? SET : NOT_SET;
    }

    void write(const std::vector<char> & input) const {
        FILE * out = fopen(file, "wb");
        if (!out || fwrite(input.data(), 1, input.size(), out) != input.size() || fclose(out) != 0) {
            die_fmt("cannot write %s", file);
        }
    }

    static void watch(long seconds) {
        const itimerval limit = { {}, { seconds, 0 } };
        setitimer(ITIMER_PROF, &limit, nullptr);
    }

    llama_context * ctx;
    const char    * file;
    const int       every;
    const int       n_embd;
    int             n_loaded = 0;
    common_params   params;

    const std::vector<float> unsteered;
};

int main(int argc, char ** argv) {
    if (argc != 4) {
        die("usage: loader MODEL FILE EVERY < inputs > results");
    }

    llama_log_set(count_logged_error, nullptr);
    common_log_set_verbosity_thold(LOG_LEVEL_ERROR);

    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = 32;
    cparams.n_batch         = 8;
    cparams.n_threads       = 1;
    cparams.n_threads_batch = 1;
    llama_context * ctx = model ? llama_init_from_model(model, cparams) : nullptr;
    if (!ctx) {
        die_fmt("cannot load %s", argv[1]);
    }

    __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
    {
        loader_under_test loader(ctx, argv[2], atoi(argv[3]));
        std::vector<char> input;
        uint32_t size;
        while (fread(&size, sizeof(size), 1, stdin) == 1) {
            input.resize(size);
            if (fread(input.data(), 1, size, stdin) != size) {
                die("the last input is not whole");
            }
            const result res = loader.run(input);
            fwrite(&res, sizeof(res), 1, stdout);
            fflush(stdout);
        }
    }

    llama_free(ctx);
    llama_model_free(model);
}
