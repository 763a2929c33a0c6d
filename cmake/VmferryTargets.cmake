# Targets of the project: one static library per folder of design section 4, one test program per library.
#
# Sources are globbed so that adding a file touches no list; the folder is the list.

find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
find_package(OpenSSL REQUIRED)
pkg_check_modules(LIBURING REQUIRED IMPORTED_TARGET liburing)
pkg_check_modules(LIBZSTD REQUIRED IMPORTED_TARGET libzstd)
pkg_check_modules(LIBXXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(LIBSYSTEMD REQUIRED IMPORTED_TARGET libsystemd)
find_package(fmt REQUIRED)
find_package(spdlog REQUIRED)
find_package(nlohmann_json REQUIRED)

add_library(vf_options INTERFACE)
target_include_directories(vf_options INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_options(vf_options INTERFACE -Wall -Wextra -Wconversion -Wsign-conversion -Werror
  -fno-omit-frame-pointer)
target_compile_definitions(vf_options INTERFACE VMFERRY_VERSION="${PROJECT_VERSION}" _FILE_OFFSET_BITS=64)
if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  target_compile_options(vf_options INTERFACE -Wthread-safety)
endif()
# One flavour of sanitizer per build tree; the options apply to every target alike.
if(VMFERRY_ASAN OR VMFERRY_TSAN)
  add_compile_options(-O1 -gline-tables-only)
endif()
if(VMFERRY_ASAN)
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=all)
  add_link_options(-fsanitize=address,undefined)
elseif(VMFERRY_TSAN)
  add_compile_options(-fsanitize=thread)
  add_link_options(-fsanitize=thread)
endif()
if(VMFERRY_FUZZ)
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()
if(VMFERRY_COVERAGE)
  add_compile_options(--coverage)
  add_link_options(--coverage)
endif()

# vf_library(NAME [DIR folder] [DEPS libs...])
# Library from all *.cpp of the current folder (or DIR). A folder of headers only becomes an INTERFACE library.
function(vf_library name)
  cmake_parse_arguments(A "" "DIR" "DEPS" ${ARGN})
  if(NOT A_DIR)
    set(A_DIR ${CMAKE_CURRENT_SOURCE_DIR})
  endif()
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${A_DIR}/*.cpp)
  if(sources)
    add_library(${name} STATIC ${sources})
    target_link_libraries(${name} PUBLIC vf_options ${A_DEPS})
  else()
    add_library(${name} INTERFACE)
    target_link_libraries(${name} INTERFACE vf_options ${A_DEPS})
  endif()
endfunction()

# What a sanitized tree needs: the programs of the unit tests and nothing of the daemon's and the tools' own.
add_custom_target(unit_tests)

# vf_unit_test(FOLDER [DEPS libs...]): program unit_<folder> from tests/unit/<folder>/*_test.cpp.
# Each TEST becomes one ctest entry named unit.<folder>.Suite.Name.
function(vf_unit_test folder)
  cmake_parse_arguments(A "" "" "DEPS" ${ARGN})
  string(REPLACE "/" "_" suffix ${folder})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/unit/${folder}/*.cpp)
  if(NOT sources)
    return()
  endif()
  add_executable(unit_${suffix} ${sources})
  target_link_libraries(unit_${suffix} PRIVATE vf_options ${A_DEPS} GTest::gmock GTest::gtest_main)
  add_dependencies(unit_tests unit_${suffix})
  add_test(NAME unit.${suffix} COMMAND unit_${suffix} --gtest_brief=1
    WORKING_DIRECTORY ${CMAKE_BINARY_DIR})  # golden files are named relative to the build folder
  set_tests_properties(unit.${suffix} PROPERTIES LABELS unit TIMEOUT 300)
endfunction()
