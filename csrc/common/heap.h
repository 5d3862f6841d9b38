// What C's allocator does with freed memory.
#pragma once

namespace rmk {

// From now on this process keeps freed blocks of up to 1 GB for the next allocation, where its C library is glibc and
// lets itself be told so; returns whether it is and does.
bool keep_freed_memory();

}  // namespace rmk
