// Copies pieces of memory, each with the threads of one block. Source of `pieces.ptx`.
// A piece never overlaps another that is written, so the order does not matter.

struct Piece {
    unsigned long long source;
    unsigned long long target;
    unsigned long long bytes;
};

struct Pieces {
    unsigned long long count;
    Piece all[128];
};

extern "C" __global__ void __launch_bounds__(512) kvtier_copy_pieces(const __grid_constant__ Pieces pieces) {
    for (unsigned at = blockIdx.x; at < pieces.count; at += gridDim.x) {
        const Piece piece = pieces.all[at];
        const unsigned long long step = blockDim.x;
        unsigned long long done = 0;
        if (((piece.source | piece.target) & 15) == 0) {
            const uint4* source = reinterpret_cast<const uint4*>(piece.source);
            uint4* target = reinterpret_cast<uint4*>(piece.target);
            const unsigned long long words = piece.bytes / 16;
            unsigned long long word = threadIdx.x;
            // Four loads under way in each thread hide the latency of a bus.
            for (; word + 3 * step < words; word += 4 * step) {
                const uint4 first = source[word];
                const uint4 second = source[word + step];
                const uint4 third = source[word + 2 * step];
                const uint4 fourth = source[word + 3 * step];
                target[word] = first;
                target[word + step] = second;
                target[word + 2 * step] = third;
                target[word + 3 * step] = fourth;
            }
            for (; word < words; word += step) {
                target[word] = source[word];
            }
            done = words * 16;
        }
        const unsigned char* source = reinterpret_cast<const unsigned char*>(piece.source);
        unsigned char* target = reinterpret_cast<unsigned char*>(piece.target);
        for (unsigned long long byte = done + threadIdx.x; byte < piece.bytes; byte += step) {
            target[byte] = source[byte];
        }
    }
}
