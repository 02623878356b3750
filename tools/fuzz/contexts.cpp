// Two contexts over one model, each with an edit of its own, in two threads; then one context whose edit is
// set, changed and cleared again and again. Made to be run under sanitizers.
//
//   contexts MODEL ROUNDS CYCLES
//
// Prints the bytes that are allocated before and after the cycles. Ends with 1 where an answer is not, bit for
// bit, what the same edit gives in a context that is alone.

#include "allocator.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using logits = std::vector<float>;

static const float STRENGTHS[] = { 0.0f, 0.5f, 1.0f };
static const int   N_STRENGTHS = 3;
static const int   WARM_UP     = 20; // cycles until every buffer has its size

class steered_context {
public:
    // removes n_remove directions in each layer and adds one in the last
    steered_context(llama_model * model, int n_remove) : model(model), n_embd(llama_model_n_embd(model)) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx           = 32;
        params.n_batch         = 8;
        params.n_threads       = 1;
        params.n_threads_batch = 1;
        ctx = llama_init_from_model(model, params);
        if (!ctx) {
            throw std::runtime_error("no context");
        }

        u.resize(n_embd*n_remove, 0.0f);
        v.resize(n_remove*n_embd, 0.0f);
        for (int i = 0; i < n_remove; ++i) {
            u[i*n_remove + i] = -1.0f;
            v[i*n_embd   + i] =  1.0f;
        }
        add.resize(n_embd, 0.25f);
        for (int il = 0; il < llama_model_n_layer(model); ++il) {
            edits.push_back({ il, 0, true, n_remove, u.data(), v.data(), nullptr });
        }
        edits.push_back({ llama_model_n_layer(model) - 1, 0, false, 0, nullptr, nullptr, add.data() });
    }

    ~steered_context() {
        llama_free(ctx);
    }

    steered_context(const steered_context &) = delete;

    void set() {
        check(llama_set_adapter_edits(ctx, edits.data(), edits.size(), n_embd), "an edit cannot be set");
    }

    void clear() {
        check(llama_set_adapter_edits(ctx, nullptr, 0, n_embd), "an edit cannot be cleared");
    }

    void set_strength(float strength) {
        check(llama_set_adapter_edit_strength(ctx, 0, -1, strength, 0, -1), "a strength cannot be set");
    }

    logits decode() {
        llama_memory_clear(llama_get_memory(ctx), true);
        llama_token tokens[] = { 2, 3, 5 };
        check(llama_decode(ctx, llama_batch_get_one(tokens, 3)), "llama_decode fails");
        const float * last = llama_get_logits_ith(ctx, -1);
        return logits(last, last + llama_vocab_n_tokens(llama_model_get_vocab(model)));
    }

    // set, decode at each strength, clear, decode
    std::vector<logits> cycle() {
        std::vector<logits> answers;
        set();
        for (float strength : STRENGTHS) {
            set_strength(strength);
            answers.push_back(decode());
        }
        clear();
        answers.push_back(decode());
        return answers;
    }

    // an edit that has a mistake is refused, and leaves the one in force
    void refuse() {
        const llama_layer_edit wrong = { llama_model_n_layer(model), 0, 0, nullptr, add.data() };
        if (llama_set_adapter_edits(ctx, &wrong, 1, n_embd) == 0) {
            throw std::runtime_error("an edit of a layer that is not there was set");
        }
    }

private:
    static void check(int32_t status, const char * what) {
        if (status != 0) {
            throw std::runtime_error(what);
        }
    }

    llama_model   * model;
    llama_context * ctx = nullptr;

    const int n_embd;
    std::vector<float> u;
    std::vector<float> v;
    std::vector<float> add;
    std::vector<llama_layer_edit> edits;
};

static void check_sane(const std::vector<logits> & alone) {
    const logits & unsteered = alone[N_STRENGTHS];
    if (alone[0] != unsteered) {
        throw std::runtime_error("strength 0 is not the unsteered model");
    }
    if (alone[1] == unsteered || alone[2] == unsteered || alone[1] == alone[2]) {
        throw std::runtime_error("a strength has no effect");
    }
}

static void repeat(steered_context & context, const std::vector<logits> & alone, int rounds, std::string & failure) {
    try {
        for (int i = 0; i < rounds; ++i) {
            if (context.cycle() != alone) {
                throw std::runtime_error("an answer beside another context differs");
            }
            context.refuse();
        }
    } catch (const std::exception & error) {
        failure = error.what();
    }
}

static void run_beside_each_other(llama_model * model, int rounds) {
    steered_context first(model, 1);
    steered_context second(model, 3);
    const auto first_alone  = first.cycle();
    const auto second_alone = second.cycle();
    check_sane(first_alone);
    check_sane(second_alone);

    std::string failures[2];
    std::thread other([&] { repeat(second, second_alone, rounds, failures[1]); });
    repeat(first, first_alone, rounds, failures[0]);
    other.join();
    for (const auto & failure : failures) {
        if (!failure.empty()) {
            throw std::runtime_error(failure);
        }
    }
}

// a cycle sets, changes and clears; every hundredth one decodes as well
static void run_cycles(llama_model * model, int cycles) {
    steered_context context(model, 2);
    const auto alone = context.cycle();
    size_t before = 0;
    for (int i = -WARM_UP; i < cycles; ++i) {
        if (i == 0) {
            before = __sanitizer_get_current_allocated_bytes();
        }
        if (i % 100 == 0 && context.cycle() != alone) {
            throw std::runtime_error("an answer differs after " + std::to_string(i) + " cycles");
        }
        context.set();
        context.set_strength(STRENGTHS[(i + WARM_UP) % N_STRENGTHS]);
        context.refuse();
        context.clear();
    }
    printf("%zu %zu\n", before, __sanitizer_get_current_allocated_bytes());
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: contexts MODEL ROUNDS CYCLES\n");
        return 2;
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    int status = 0;
    try {
        if (!model) {
            throw std::runtime_error(std::string("cannot load ") + argv[1]);
        }
        run_beside_each_other(model, atoi(argv[2]));
        run_cycles(model, atoi(argv[3]));
    } catch (const std::exception & error) {
        fprintf(stderr, "contexts: %s\n", error.what());
        status = 1;
    }
    llama_model_free(model);
    return status;
}
