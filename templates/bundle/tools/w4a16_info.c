/* Rendered from templates/bundle/tools/w4a16_info.c; do not edit. */

/* Prints what the library is, which tactics it has, and whether the current GPU runs it.  Needs no GPU. */

#include <stdio.h>
#include <string.h>

#include "w4a16.h"

static const char *const quant_op_names[] = {"per_column", "group_scale", "group_scale_zero"};

static void print_json_string(const char *text) {
    putchar('"');
    for (; *text != '\0'; ++text) {
        const unsigned char character = (unsigned char)*text;
        if (character == '"' || character == '\\') {
            printf("\\%c", character);
        } else if (character < 0x20) {
            printf("\\u%04x", character);
        } else {
            putchar(character);
        }
    }
    putchar('"');
}

static void print_json_member(const char *name, const char *value) {
    printf("\"%s\": ", name);
    print_json_string(value);
    printf(", ");
}

static void print_json_triple(const char *name, const int32_t values[3]) {
    printf("\"%s\": [%d, %d, %d], ", name, (int)values[0], (int)values[1], (int)values[2]);
}

static void print_json(const w4a16_build *build, const w4a16_device *device, w4a16_status status, const char *reason) {
    printf("{");
    print_json_member("version", build->version);
    printf("\"api_version\": %u, ", (unsigned)build->api_version);
    print_json_member("profile", build->profile);
    print_json_member("architecture", build->architecture);
    print_json_member("release", build->release);
    print_json_member("trtllm_commit", build->trtllm_commit);
    print_json_member("cutlass_commit", build->cutlass_commit);
    print_json_member("bundle_digest", build->bundle_digest);
    print_json_member("compiler", build->compiler);
    print_json_member("compress", build->compress);
    printf("\"cuda_runtime_version\": %d, ", (int)build->cuda_runtime_version);
    print_json_member("gemv_reason", build->gemv_reason);
    printf("\"device\": {");
    print_json_member("status", w4a16_status_name(status));
    print_json_member("reason", reason);
    print_json_member("name", device->name);
    printf("\"index\": %d, \"cc\": [%d, %d], \"sm_count\": %d, \"driver_version\": %d}, ", (int)device->device,
        (int)device->cc_major, (int)device->cc_minor, (int)device->sm_count, (int)device->driver_version);
    printf("\"tactics\": [");
    for (int32_t index = 0; index < build->tactic_count; ++index) {
        w4a16_tactic_info tactic = {0};
        tactic.struct_size = sizeof tactic;
        w4a16_tactic(index, &tactic);
        printf("%s\n  {", index == 0 ? "" : ",");
        print_json_member("name", tactic.name);
        print_json_member("kind", tactic.kind);
        print_json_member("schedule", tactic.schedule);
        print_json_triple("tile", tactic.tile);
        print_json_triple("cluster", tactic.cluster);
        printf("\"m\": [%lld, %lld], \"group_multiple\": %d, \"groups\": [", (long long)tactic.m_min,
            (long long)tactic.m_max, (int)tactic.group_multiple);
        for (int i = 0; tactic.groups[i] != 0; ++i) {
            printf("%s%d", i == 0 ? "" : ", ", (int)tactic.groups[i]);
        }
        printf("], \"uses_workspace\": %s, \"quant_ops\": [", tactic.uses_workspace ? "true" : "false");
        const char *separator = "";
        for (int quant_op = 0; quant_op < 3; ++quant_op) {
            if (tactic.quant_ops >> quant_op & 1u) {
                printf("%s\"%s\"", separator, quant_op_names[quant_op]);
                separator = ", ";
            }
        }
        printf("]}");
    }
    printf("\n]}\n");
}

static void print_text(const w4a16_build *build, const w4a16_device *device, w4a16_status status, const char *reason) {
    printf("w4a16 %s (API %u), profile %s, built for %s\n", build->version, (unsigned)build->api_version, build->profile,
        build->architecture);
    printf("TensorRT-LLM   %s, commit %s\n", build->release, build->trtllm_commit);
    printf("CUTLASS        commit %s\n", build->cutlass_commit);
    printf("bundle         %s\n", build->bundle_digest);
    printf("compiler       %s; device code compressed: %s\n", build->compiler, build->compress);
    printf("CUDA runtime   %d.%d\n", build->cuda_runtime_version / 1000, build->cuda_runtime_version % 1000 / 10);
    if (device->driver_version != 0) {
        printf("driver         supports CUDA %d.%d\n", device->driver_version / 1000, device->driver_version % 1000 / 10);
    }
    if (device->cc_major != 0) {
        printf("device         %d: %s, sm_%d%d, %d SMs\n", (int)device->device, device->name, (int)device->cc_major,
            (int)device->cc_minor, (int)device->sm_count);
    }
    if (status == W4A16_OK) {
        printf("usable         yes\n");
    } else {
        printf("usable         no: %s\n", reason);
    }
    if (build->gemv_reason[0] != '\0') {
        printf("no gemv        %s\n", build->gemv_reason);
    }
    printf("\n%d tactics\n", (int)build->tactic_count);
    printf("%-26s %-12s %-10s %-20s %-9s %s\n", "name", "schedule", "M", "group sizes", "workspace", "quant ops");
    for (int32_t index = 0; index < build->tactic_count; ++index) {
        w4a16_tactic_info tactic = {0};
        tactic.struct_size = sizeof tactic;
        w4a16_tactic(index, &tactic);
        char rows[32] = "any";
        if (tactic.m_max < 1000000) {
            snprintf(rows, sizeof rows, "%d to %d", (int)tactic.m_min, (int)tactic.m_max);
        }
        char groups[96] = "";
        if (tactic.group_multiple > 0) {
            snprintf(groups, sizeof groups, "multiples of %d", (int)tactic.group_multiple);
        }
        for (int i = 0; tactic.groups[i] != 0; ++i) {
            const size_t used = strlen(groups);
            snprintf(groups + used, sizeof groups - used, "%s%d", i == 0 ? "" : ", ", (int)tactic.groups[i]);
        }
        printf("%-26s %-12s %-10s %-20s %-9s", tactic.name, tactic.schedule, rows, groups,
            tactic.uses_workspace ? "yes" : "no");
        for (int quant_op = 0; quant_op < 3; ++quant_op) {
            if (tactic.quant_ops >> quant_op & 1u) {
                printf(" %s", quant_op_names[quant_op]);
            }
        }
        printf("\n");
    }
}

int main(int argc, char **argv) {
    const int json = argc == 2 && strcmp(argv[1], "--json") == 0;
    if (argc > 1 && !json) {
        fprintf(strcmp(argv[1], "--help") == 0 ? stdout : stderr, "usage: w4a16_info [--json]\n");
        return strcmp(argv[1], "--help") == 0 ? 0 : 2;
    }
    w4a16_build build = {0};
    build.struct_size = sizeof build;
    if (w4a16_build_info(&build) != W4A16_OK) {
        fprintf(stderr, "w4a16_info: %s\n", w4a16_last_error());
        return 1;
    }
    w4a16_device device = {0};
    device.struct_size = sizeof device;
    const w4a16_status status = w4a16_check_device(-1, &device);
    (json ? print_json : print_text)(&build, &device, status, status == W4A16_OK ? "" : w4a16_last_error());
    return 0;
}
