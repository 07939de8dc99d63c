// Feeds given token ids to llama.cpp and prints timings as one line of JSON. llama-bench would do, but it draws its
// own random tokens; here all engines get the same ids, and so route alike.
//
//   llama_driver MODEL IDS mmap|none|dio repack(0|1) THREADS CONTEXT PREFILL REPEATS WARM DECODE
//
// IDS is a file of int32. Prefill: REPEATS + 1 times PREFILL ids in one batch on an empty cache, the first one not
// counted; then on an empty cache WARM ids one at a time, not counted, and DECODE ids one at a time.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "llama.h"

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A number from a file of "name: value" lines.
static long long proc_value(const char * path, const char * name) {
    long long value = -1;
    char line[256];
    if (FILE * file = fopen(path, "r")) {
        while (fgets(line, sizeof line, file))
            if (!strncmp(line, name, strlen(name))) value = atoll(line + strlen(name) + 1);
        fclose(file);
    }
    return value;
}

static void quiet(ggml_log_level level, const char * text, void *) {
    if (level >= GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static void decode(llama_context * context, int32_t * ids, int count) {
    if (llama_decode(context, llama_batch_get_one(ids, count))) {
        fprintf(stderr, "llama_decode failed\n");
        exit(1);
    }
}

int main(int argc, char ** argv) {
    if (argc != 11) return 2;
    const std::string mode = argv[3];
    const int repack = atoi(argv[4]), threads = atoi(argv[5]), length = atoi(argv[6]);
    const int prefill = atoi(argv[7]), repeats = atoi(argv[8]), warm = atoi(argv[9]), count = atoi(argv[10]);
    std::vector<int32_t> ids;
    if (FILE * file = fopen(argv[2], "rb")) {
        int32_t id;
        while (fread(&id, sizeof id, 1, file) == 1) ids.push_back(id);
        fclose(file);
    }
    if ((int) ids.size() < warm + count + prefill * (repeats + 1)) {
        fprintf(stderr, "%s holds too few ids\n", argv[2]);
        return 2;
    }
    llama_log_set(quiet, nullptr);
    llama_backend_init();
    const double begin = now();
    llama_model_params model_params = llama_model_default_params();
    model_params.load_mode = mode == "mmap" ? LLAMA_LOAD_MODE_MMAP
                           : mode == "dio"  ? LLAMA_LOAD_MODE_DIRECT_IO
                                            : LLAMA_LOAD_MODE_NONE;
    model_params.use_extra_bufts = repack != 0;
    llama_model * model = llama_model_load_from_file(argv[1], model_params);
    if (!model) return 1;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = length;
    params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = threads;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) return 1;
    const double loaded = now();

    int32_t * next = ids.data();
    std::string prefill_times, decode_times, choices;
    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (int i = 0; prefill && i <= repeats; i++, next += prefill) {
        llama_memory_clear(llama_get_memory(context), true);
        const double start = now();
        decode(context, next, prefill);
        if (i) prefill_times += (i > 1 ? "," : "") + std::to_string(now() - start);
    }
    llama_memory_clear(llama_get_memory(context), true);
    for (int i = 0; i < warm; i++) decode(context, next++, 1);
    const long long read_before = proc_value("/proc/self/io", "read_bytes");
    for (int i = 0; i < count; i++) {
        const double start = now();
        decode(context, next++, 1);
        const float * logits = llama_get_logits_ith(context, -1);  // waits for the result
        decode_times += (i ? "," : "") + std::to_string(now() - start);
        const long best = std::max_element(logits, logits + vocabulary) - logits;
        choices += (i ? "," : "") + std::to_string(best);
    }
    printf("{\"load_s\":%.3f,\"prefill_s\":[%s],\"decode_s\":[%s],\"argmax\":[%s],\"disk_bytes\":%lld,\"peak_rss\":%lld}\n",
           loaded - begin, prefill_times.c_str(), decode_times.c_str(), choices.c_str(),
           proc_value("/proc/self/io", "read_bytes") - read_before,
           proc_value("/proc/self/status", "VmHWM") * 1024);
    fflush(stdout);
    _Exit(0);  // nothing to clean up, and freeing gigabytes takes a while
}
