// What torch's headers take from newer C and C++ libraries than torch's own wheels need: kept inside (exports.map), so
// that a library built by GCC 11 or 12 loads wherever torch does: manylinux_2_28, with glibc 2.28 and GCC 8's
// libstdc++.
#include <sstream>
#include <string>

#ifdef __GLIBCXX__
// Members of string streams that became symbols of libstdc++.so in GCC 9 and, for C++20, in GCC 11.
template std::basic_stringbuf<char>::basic_stringbuf();
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();
#if _GLIBCXX_RELEASE >= 11 && __cplusplus > 201703L
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;
#endif

// How std::shared_ptr learns from glibc 2.32 on that it may count without atomics. "No" is right at all times.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
