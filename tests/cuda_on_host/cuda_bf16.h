// The test-only stand-in for this header of CUDA.
#include "cuda_on_host.h"
