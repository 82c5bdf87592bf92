// An NVIDIA GPU that computes nothing. Preloaded, it answers PyTorch's calls of the CUDA runtime, driver, cuBLAS, cuDNN,
// nvJPEG and NCCL. Memory is real, lazily mapped and bounded; copies from and to the host are real; kernels are counted, not run.
//
// NULLGPU_SM (80, 90, 100), NULLGPU_BYTES and NULLGPU_DEVICES say what it pretends to be. With NULLGPU_ZEROS=1 nothing is
// copied to the device, whose memory then holds zeros, so that no result depends on what reused memory held. build.py
// adds a stub that returns 0 for whatever else PyTorch's libraries want.
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
// These names are macros of newer versions; both must exist.
#undef cudaGetDeviceProperties
#undef cuDeviceTotalMem

static const struct card { int sm; const char *name; size_t bytes; int processors; int shared; int l2; } CARDS[] = {
    {80, "Null A100", 85094825984, 108, 166912, 41943040},
    {90, "Null H100", 84929085440, 132, 232448, 52428800},
    {100, "Null B200", 191500000000, 148, 232448, 132120576},
};

static long setting(const char *name, long usual) {
    const char *text = getenv(name);
    return text ? strtol(text, NULL, 10) : usual;
}
static const struct card *card(void) {
    long sm = setting("NULLGPU_SM", 90);
    for (size_t i = 0; i < sizeof CARDS / sizeof *CARDS; i++)
        if (CARDS[i].sm == sm) return &CARDS[i];
    fprintf(stderr, "NULLGPU_SM is %ld; it is 80, 90 or 100\n", sm);
    abort();
}
static size_t capacity(void) { return setting("NULLGPU_BYTES", card()->bytes); }
static int devices(void) { return setting("NULLGPU_DEVICES", 1); }

static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static __thread int current_device;

// Handles are never dereferenced: a new odd-looking address each.
static void *new_handle(void) {
    static size_t last = 0x10000;
    return (void *)__sync_add_and_fetch(&last, 64);
}

// ---------------------------------------------------------------------------------------------------------- memory
// Copies larger than this between places on the device are left out: nobody reads their values.
#define SMALL 65536
#define PAGE 2097152  // what the driver gives at least
#define MOST_BLOCKS 32768

static struct block { char *start; size_t bytes; enum cudaMemoryType type; } blocks[MOST_BLOCKS];
static int blocks_end;
static size_t used;

static void add_block(void *start, size_t bytes, enum cudaMemoryType type) {
    int i = 0;
    while (i < blocks_end && blocks[i].start) i++;
    if (i == MOST_BLOCKS) { fprintf(stderr, "nullgpu: over %d blocks of memory\n", MOST_BLOCKS); abort(); }
    if (i == blocks_end) blocks_end++;
    blocks[i] = (struct block){start, bytes, type};
}
static struct block *block_of(const void *pointer) {
    for (int i = 0; i < blocks_end; i++)
        if (blocks[i].start && (size_t)((char *)pointer - blocks[i].start) < blocks[i].bytes) return &blocks[i];
    return NULL;
}
static int on_device(const void *pointer) {
    pthread_mutex_lock(&guard);
    struct block *block = block_of(pointer);
    int found = block && block->type == cudaMemoryTypeDevice;
    pthread_mutex_unlock(&guard);
    return found;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    size_t rounded = (bytes + PAGE - 1) / PAGE * PAGE;
    cudaError_t error = cudaErrorMemoryAllocation;
    *pointer = NULL;
    if (!bytes) return cudaSuccess;
    pthread_mutex_lock(&guard);
    if (used + rounded <= capacity()) {
        void *found = mmap(NULL, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found != MAP_FAILED) {
            add_block(found, rounded, cudaMemoryTypeDevice);
            used += rounded;
            *pointer = found;
            error = cudaSuccess;
        }
    }
    pthread_mutex_unlock(&guard);
    return error;
}
cudaError_t cudaFree(void *pointer) {
    pthread_mutex_lock(&guard);
    struct block *block = pointer ? block_of(pointer) : NULL;
    if (block) {
        munmap(block->start, block->bytes);
        used -= block->bytes;
        block->start = NULL;
    }
    pthread_mutex_unlock(&guard);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) {
    *all = capacity();
    *left = *all - used;
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags) {
    pthread_mutex_lock(&guard);
    add_block(pointer, bytes, cudaMemoryTypeHost);
    pthread_mutex_unlock(&guard);
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *pointer) {
    pthread_mutex_lock(&guard);
    struct block *block = block_of(pointer);
    if (block) block->start = NULL;
    pthread_mutex_unlock(&guard);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    if (posix_memalign(pointer, 4096, bytes ? bytes : 1)) return cudaErrorMemoryAllocation;
    return cudaHostRegister(*pointer, bytes, flags);
}
cudaError_t cudaFreeHost(void *pointer) {
    cudaHostUnregister(pointer);
    free(pointer);
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    pthread_mutex_lock(&guard);
    struct block *block = block_of(pointer);
    if (block) {
        attributes->type = block->type;
        attributes->device = current_device;
        attributes->devicePointer = attributes->hostPointer = (void *)pointer;
    }
    pthread_mutex_unlock(&guard);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    int into = on_device(to);
    if (into && setting("NULLGPU_ZEROS", 0)) return cudaSuccess;
    if (bytes <= SMALL || !into || !on_device(from)) memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind, NULL);
}
cudaError_t cudaMemsetAsync(void *start, int value, size_t bytes, cudaStream_t stream) {
    if (bytes <= SMALL && !setting("NULLGPU_ZEROS", 0)) memset(start, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *start, int value, size_t bytes) { return cudaMemsetAsync(start, value, bytes, NULL); }
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    static char symbols[1 << 20];
    *pointer = symbols;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------- device
cudaError_t cudaGetDeviceCount(int *count) { *count = devices(); return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = current_device; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    const struct card *is = card();
    memset(found, 0, sizeof *found);
    strncpy(found->name, is->name, sizeof found->name - 1);
    found->totalGlobalMem = capacity();
    found->major = is->sm / 10;
    found->minor = is->sm % 10;
    found->multiProcessorCount = is->processors;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = 2048;
    found->maxBlocksPerMultiProcessor = 32;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->sharedMemPerBlock = 49152;
    found->sharedMemPerBlockOptin = is->shared;
    found->sharedMemPerMultiprocessor = is->shared + 1024;
    found->l2CacheSize = is->l2;
    found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxGridSize[0] = 2147483647;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->textureAlignment = 512;
    found->texturePitchAlignment = 32;
    found->totalConstMem = 65536;
    found->memoryBusWidth = 5120;
    found->canMapHostMemory = found->unifiedAddressing = found->managedMemory = found->concurrentKernels = 1;
    found->pciBusID = device + 1;
    return cudaSuccess;
}
static int attribute(CUdevice_attribute which) {
    struct cudaDeviceProp is;
    cudaGetDeviceProperties(&is, 0);
    switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return is.maxThreadsPerBlock;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: return is.maxThreadsDim[0];
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return is.maxThreadsDim[1];
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return is.maxThreadsDim[2];
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return is.maxGridSize[0];
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: return is.maxGridSize[1];
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return is.maxGridSize[2];
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return is.sharedMemPerBlock;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return is.sharedMemPerBlockOptin;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return is.sharedMemPerMultiprocessor;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return is.warpSize;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return is.regsPerBlock;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return is.regsPerMultiprocessor;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return is.multiProcessorCount;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return is.maxBlocksPerMultiProcessor;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return is.maxThreadsPerMultiProcessor;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return is.major;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return is.minor;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return is.l2CacheSize;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return is.memoryBusWidth;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1755000;         // kHz
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;  // kHz
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
    default: return 0;
    }
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    *value = attribute((CUdevice_attribute)which);  // the runtime numbers them as the driver does
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDA_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDA_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int one, int other) { *can = 1; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}
const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "refused by the null GPU";
}

// ----------------------------------------------------------------------------------------------- streams and events
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { *stream = new_handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = new_handle();
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = new_handle(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = new_handle(); return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 1;
    return cudaSuccess;
}
// A graph is a number of launches: those of its capture, which counts none. One stream is captured at a time.
static cudaStream_t captured;
static unsigned long long captures;
static long captured_launches, graph_launches;
static enum cudaStreamCaptureStatus status_of(cudaStream_t stream) {
    return captured && stream == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    captured = stream;
    captures++;
    captured_launches = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    long *made = malloc(sizeof *made);  // kept: a few bytes for each graph
    *made = captured_launches;
    *graph = (cudaGraph_t)made;
    captured = NULL;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = status_of(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    *status = status_of(stream);
    if (id) *id = captured ? captures : 0;
    if (graph) *graph = NULL;
    if (count) *count = 0;
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = *(long *)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *ready, cudaGraph_t graph, unsigned long long flags) {
    *ready = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *ready, cudaGraph_t graph, unsigned long long flags) {
    *ready = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
void nullgpu_call(const char *);
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    graph_launches += *(long *)graph;
    nullgpu_call("cudaGraphLaunch");
    return cudaSuccess;
}
// For tests: how many kernels the launched graphs had since the last call.
long nullgpu_in_graphs(void) {
    long found = graph_launches;
    graph_launches = 0;
    return found;
}

// --------------------------------------------------------------------------------------------------------- kernels
// Calls are counted by the address of a kernel or of a library function's name.
#define MOST_KERNELS 131072
static struct kernel { const void *address; const char *name; long calls; } kernels[MOST_KERNELS];

static struct kernel *kernel_at(const void *address) {
    size_t i = ((size_t)address >> 4) * 2654435761u % MOST_KERNELS;
    while (kernels[i].address && kernels[i].address != address) i = (i + 1) % MOST_KERNELS;
    kernels[i].address = address;
    return &kernels[i];
}
static int launch(const void *address) {
    pthread_mutex_lock(&guard);
    if (captured) captured_launches++;
    else kernel_at(address)->calls++;
    pthread_mutex_unlock(&guard);
    return 0;
}
void nullgpu_call(const char *name) {
    pthread_mutex_lock(&guard);
    struct kernel *kernel = kernel_at(name);
    kernel->name = name;
    if (captured) captured_launches++;
    else kernel->calls++;
    pthread_mutex_unlock(&guard);
}
// For tests, by ctypes: forget the counts; or write "calls TAB name" lines and return how many calls there were.
void nullgpu_reset(void) {
    for (int i = 0; i < MOST_KERNELS; i++) kernels[i].calls = 0;
}
long nullgpu_report(const char *path) {
    FILE *file = fopen(path, "w");
    long all = 0;
    if (!file) return -1;
    for (int i = 0; i < MOST_KERNELS; i++) {
        if (!kernels[i].calls) continue;
        all += kernels[i].calls;
        fprintf(file, "%ld\t%s\n", kernels[i].calls, kernels[i].name ? kernels[i].name : "unnamed");
    }
    fclose(file);
    return all;
}

void **__cudaRegisterFatBinary(void *binary) { static void *image[4]; return image; }
void __cudaRegisterFatBinaryEnd(void **image) {}
void __cudaUnregisterFatBinary(void **image) {}
void __cudaRegisterVar(void **image, char *variable, char *address, const char *name, int external, size_t bytes,
                       int constant, int global) {}
void __cudaRegisterFunction(void **image, const char *address, char *function, const char *name, int limit, void *thread,
                            void *block, void *block_size, void *grid_size, int *warp_size) {
    kernel_at(address)->name = name;
}
static __thread struct { dim3 grid, block; size_t shared; void *stream; } launch_configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    launch_configuration.grid = grid;
    launch_configuration.block = block;
    launch_configuration.shared = shared;
    launch_configuration.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = launch_configuration.grid;
    *block = launch_configuration.block;
    *shared = launch_configuration.shared;
    *(void **)stream = launch_configuration.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(void **kernel, const void *address) { *kernel = (void *)address; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(kernel);
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(kernel);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *kernel, void **arguments) {
    return launch(kernel);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->ptxVersion = found->binaryVersion = card()->sm;
    found->maxDynamicSharedSizeBytes = card()->shared;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                                   size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------- driver
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = devices(); return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    *value = attribute(which);
    return CUDA_SUCCESS;
}
static CUcontext context_of(int device) { return (CUcontext)(size_t)(0x1000 + device); }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = context_of(device); return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = context_of(current_device); return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = current_device; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "refused by the null GPU"; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = new_handle(); return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    char *kept = strdup(name);  // its address is the kernel's
    pthread_mutex_lock(&guard);
    kernel_at(kept)->name = kept;
    pthread_mutex_unlock(&guard);
    *function = (CUfunction)kept;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **arguments, void **more) {
    return launch(function);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **arguments, void **more) {
    return launch(function);
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *how) {
    *clusters = 16;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr pointer) {
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = pointer;
    else *(int *)value = which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE ? CU_MEMORYTYPE_DEVICE : 0;
    return CUDA_SUCCESS;
}
// Tables of unnamed functions, which a library with a CUDA runtime of its own asks for (nvJPEG): there are none.
CUresult cuGetExportTable(const void **table, const CUuuid *which) {
    *table = NULL;
    return CUDA_ERROR_NOT_SUPPORTED;
}
// PyTorch asks for driver functions by name. One that is not here does nothing and succeeds.
static int nothing(void) { return 0; }
static void *function_named(const char *name) {
    static void *library;
    if (!library) {
        Dl_info own;
        dladdr((void *)cuDeviceGet, &own);
        library = dlopen(own.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    }
    char newer[256];
    snprintf(newer, sizeof newer, "%s_v2", name);
    void *found = dlsym(library, newer);
    if (!found) found = dlsym(library, name);
    return found ? found : (void *)nothing;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
    *function = function_named(name);
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
    *function = function_named(name);
    if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}

// ------------------------------------------------------------------------------------------- cuBLAS, cuDNN and NCCL
int cublasCreate_v2(void **blas) { *blas = new_handle(); return 0; }
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulAlgoGetHeuristic(void *blas, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int asked, void *results, int *found) {
    memset(results, 0, 96);  // one cublasLtMatmulHeuristicResult_t: no workspace
    *found = 1;
    return 0;
}
size_t cudnnGetVersion(void) { return 92400; }
size_t cudnnGetCudartVersion(void) { return CUDA_VERSION; }
int cudnnCreate(void **dnn) { *dnn = new_handle(); return 0; }
const char *cudnnGetErrorString(int error) { return "refused by the null GPU"; }
void cudnnGetLastErrorString(char *text, size_t length) { snprintf(text, length, "refused by the null GPU"); }
// cuDNN's older interface, which TORCH_CUDNN_V8_API_DISABLED=1 chooses: one algorithm, no workspace.
static int one_algorithm(int *count, void *performance) {
    *count = 1;
    memset(performance, 0, 48);
    return 0;
}
#define ALGORITHM(NAME) \
    int NAME(void *dnn, void *a, void *b, void *c, void *d, int asked, int *count, void *performance) { \
        return one_algorithm(count, performance); \
    }
ALGORITHM(cudnnGetConvolutionForwardAlgorithm_v7)
ALGORITHM(cudnnGetConvolutionBackwardDataAlgorithm_v7)
ALGORITHM(cudnnGetConvolutionBackwardFilterAlgorithm_v7)
#define WORKSPACE(NAME) \
    int NAME(void *dnn, void *a, void *b, void *c, void *d, int algorithm, size_t *bytes) { *bytes = 0; return 0; }
WORKSPACE(cudnnGetConvolutionForwardWorkspaceSize)
WORKSPACE(cudnnGetConvolutionBackwardDataWorkspaceSize)
WORKSPACE(cudnnGetConvolutionBackwardFilterWorkspaceSize)
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void *dnn, int mode, int operation, void *a, void *b, void *c,
                                                             void *d, void *e, size_t *bytes) {
    *bytes = 0;
    return 0;
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void *dnn, int mode, int operation, void *a, void *b, void *c, void *d,
                                                      void *e, void *f, void *g, size_t *bytes) {
    *bytes = 0;
    return 0;
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *dnn, int mode, int operation, void *a, void *b, size_t *bytes) {
    *bytes = 0;
    return 0;
}

// nvJPEG's own library stops at `cuGetExportTable`. These take its place in torchvision: sizes come from a JPEG's header,
// and no pixel is written.
#define MAKES(NAME, ARGUMENTS) \
    int NAME ARGUMENTS { \
        *made = new_handle(); \
        return 0; \
    }
MAKES(nvjpegCreateSimple, (void **made))
MAKES(nvjpegCreateEx, (int backend, void *memory, void *pinned, unsigned flags, void **made))
MAKES(nvjpegJpegStateCreate, (void *jpeg, void **made))
MAKES(nvjpegDecoderCreate, (void *jpeg, int backend, void **made))
MAKES(nvjpegDecoderStateCreate, (void *jpeg, void *decoder, void **made))
MAKES(nvjpegBufferPinnedCreate, (void *jpeg, void *memory, void **made))
MAKES(nvjpegBufferDeviceCreate, (void *jpeg, void *memory, void **made))
MAKES(nvjpegJpegStreamCreate, (void *jpeg, void **made))
MAKES(nvjpegDecodeParamsCreate, (void *jpeg, void **made))
int nvjpegGetCudartProperty(int part, int *value) { *value = part ? 0 : CUDA_VERSION / 1000; return 0; }
int nvjpegGetProperty(int part, int *value) { return nvjpegGetCudartProperty(part, value); }
int nvjpegDecodeBatchedSupported(void *jpeg, void *stream, int *refused) { *refused = 0; return 0; }
int nvjpegGetImageInfo(void *jpeg, const unsigned char *data, size_t bytes, int *channels, int *subsampling, int *widths,
                       int *heights) {
    size_t at = 2;  // after the start of the image: segments of a marker, a length and so many bytes
    memset(widths, 0, 4 * sizeof *widths);
    memset(heights, 0, 4 * sizeof *heights);
    while (at + 10 <= bytes && data[at] == 0xFF) {
        int marker = data[at + 1];
        if (marker >= 0xC0 && marker <= 0xC2) {
            *channels = data[at + 9];
            *subsampling = 0;
            for (int i = 0; i < *channels && i < 4; i++) {
                heights[i] = data[at + 5] << 8 | data[at + 6];
                widths[i] = data[at + 7] << 8 | data[at + 8];
            }
            return 0;
        }
        at += 2 + (data[at + 2] << 8 | data[at + 3]);
    }
    return 3;  // NVJPEG_STATUS_BAD_JPEG
}
int nvjpegDecodeBatched(void *jpeg, void *state, const unsigned char *const *data, const size_t *bytes, void *images,
                        void *stream) {
    nullgpu_call("nvjpegDecodeBatched");
    return 0;
}

// Every process hears its own numbers, as if all had the same. Small messages are copied, large ones only counted.
static int ranks = 1;
int ncclGetVersion(int *version) { *version = 23007; return 0; }
int ncclCommGetAsyncError(void *group, int *error) { *error = 0; return 0; }
const char *ncclGetErrorString(int error) { return "refused by the null GPU"; }
const char *ncclGetLastError(void *group) { return "refused by the null GPU"; }
int ncclCommInitRankConfig(void **group, int size, ...) { *group = new_handle(); ranks = size; return 0; }
int ncclCommInitRank(void **group, int size, ...) { *group = new_handle(); ranks = size; return 0; }
int ncclCommInitRankScalable(void **group, int size, ...) { *group = new_handle(); ranks = size; return 0; }
static size_t width(int type) {  // of ncclDataType_t, in bytes
    static const size_t WIDTHS[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return type >= 0 && type < 12 ? WIDTHS[type] : 1;
}
static int repeat(const char *name, const void *from, char *to, size_t bytes, int times) {
    nullgpu_call(name);
    if (bytes * times <= SMALL)
        for (int i = 0; i < times; i++) memmove(to + i * bytes, from, bytes);
    return 0;
}
int ncclAllGather(const void *from, void *to, size_t count, int type, void *group, void *stream) {
    return repeat("ncclAllGather", from, to, count * width(type), ranks);
}
int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, void *group, void *stream) {
    return repeat("ncclAllReduce", from, to, count * width(type), 1);
}
int ncclReduceScatter(const void *from, void *to, size_t count, int type, int operation, void *group, void *stream) {
    return repeat("ncclReduceScatter", from, to, count * width(type), 1);
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, void *group, void *stream) {
    return repeat("ncclBroadcast", from, to, count * width(type), 1);
}
