// The promise that an output overlaps no input, which compilers need before they use vectors.
#pragma once

#if defined(_MSC_VER)
#define RMK_RESTRICT __restrict
#else
#define RMK_RESTRICT __restrict__
#endif
