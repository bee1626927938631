// Multiplies square matrices, each block of 32 times 32 threads a tile of the result. Source of `compute.ptx`.
// `edge` is a multiple of 32.

#define TILE 32

extern "C" __global__ void __launch_bounds__(TILE * TILE)
kvtier_multiply(const float* left, const float* right, float* result, unsigned edge) {
    __shared__ float from_left[TILE][TILE];
    __shared__ float from_right[TILE][TILE];
    const unsigned column = threadIdx.x % TILE;
    const unsigned row = threadIdx.x / TILE;
    const unsigned tiles = edge / TILE;
    const unsigned first_column = blockIdx.x % tiles * TILE;
    const unsigned first_row = blockIdx.x / tiles * TILE;
    float sum = 0.0f;
    for (unsigned tile = 0; tile < tiles; ++tile) {
        from_left[row][column] = left[(first_row + row) * edge + tile * TILE + column];
        from_right[row][column] = right[(tile * TILE + row) * edge + first_column + column];
        __syncthreads();
        for (unsigned at = 0; at < TILE; ++at) {
            sum += from_left[row][at] * from_right[at][column];
        }
        __syncthreads();
    }
    result[(first_row + row) * edge + first_column + column] = sum;
}
