# A folder of src/ is a library; the suffix of a file says what the build does with it:
#
#   x.cc  x_ref.cc      into the library
#   x_cpu.cc            into the library once per instruction set, with KL_ISA naming the namespace
#   x.cu                CUDA, for the portable list KL_CUDA_ARCHS
#   x_sm90.cu           CUDA, for sm_90a only
#   x_test.cc           into kl_tests, and into <folder>_tests (not built by default; quick to build for one folder)
#   x_cuda_bench.cc     a program of its own, x_cuda_bench (not built by default), to be carried to a GPU machine
#
# kl_folder(ops/kda DEPENDS base simd LIBRARIES foo::foo) makes the target kl_ops_kda. Its property KL_OBJECTS names all
# objects of the library, for archives that hold several folders.

# Instruction sets of x_cpu.cc files: name, then compiler flags. "generic" is what every machine of this family has.
set(KL_ISAS generic)
set(KL_ISA_FLAGS_generic "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND KL_ISAS avx2 avx512 avx512_bf16)
  set(KL_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(KL_ISA_FLAGS_avx512 -march=x86-64-v4 -mprefer-vector-width=512)
  # What Cooper Lake, Sapphire Rapids and Zen 4 have in common; older compilers know no -march for all of them.
  set(KL_ISA_FLAGS_avx512_bf16 ${KL_ISA_FLAGS_avx512} -mavx512bf16 -mavx512vnni)
endif()

# Optimisation of x_cpu.cc files. A sanitizer's checks make their large functions many times as large, and the time that GCC
# takes for a function grows faster than that (up to 43 s for a file): there functions stay apart and loops as they are. Tests
# then take a tenth longer; at -O1 they took twice the time, more than compiling gained.
set(KL_KERNEL_FLAGS -O3)
if(KL_SANITIZE)
  set(KL_KERNEL_FLAGS -O2 $<$<CXX_COMPILER_ID:GNU>:-fno-inline-functions-called-once>)
endif()

set(KL_ASKS_FOR_CUDA "^[ \t]*#[ \t]*(el)?if.*[^A-Za-z0-9_]KL_CUDA([^A-Za-z0-9_]|$)")

# Code for an instruction set that this processor lacks is never run by a sanitizer's tests here: it is compiled for the
# linker alone, without checks, which take minutes there.
set(KL_ISAS_NOT_RUN_HERE "")
if(KL_SANITIZE AND EXISTS /proc/cpuinfo)
  file(STRINGS /proc/cpuinfo processor REGEX "^flags" LIMIT_COUNT 1)
  foreach(isa avx2 avx512 avx512_bf16)
    string(REGEX REPLACE "^avx512$" "avx512vl" flag ${isa})
    if(NOT "${processor} " MATCHES "[ \t]${flag} ")
      list(APPEND KL_ISAS_NOT_RUN_HERE ${isa})
    endif()
  endforeach()
endif()

# kl_take_objects(OBJECTS SOURCES TARGET): takes out of SOURCES of TARGET what the build KL_OBJECTS_FROM compiles to the same
# bytes, and gives those object files of it as OBJECTS. Of a build for CUDA that is every x.cc that does not ask for KL_CUDA
# itself (headers may not ask); of a sanitizer's build it is nothing.
function(kl_take_objects objects_name sources_name target)
  set(taken)
  set(own)
  foreach(source ${${sources_name}})
    set(asks ON)
    if(KL_OBJECTS_FROM AND NOT KL_SANITIZE AND source MATCHES "\\.cc$")
      file(STRINGS ${source} asks REGEX "${KL_ASKS_FOR_CUDA}" LIMIT_COUNT 1)
    endif()
    if(asks)
      list(APPEND own ${source})
    else()
      list(APPEND taken ${source})
    endif()
  endforeach()
  kl_compiled(files ${target} ${taken})
  set(${objects_name} ${files} PARENT_SCOPE)
  set(${sources_name} ${own} PARENT_SCOPE)
endfunction()

# kl_compiled(OBJECTS TARGET SOURCE...): the object files of these sources of TARGET in the build KL_OBJECTS_FROM.
function(kl_compiled objects_name target)
  set(files)
  foreach(source ${ARGN})
    file(RELATIVE_PATH source ${CMAKE_SOURCE_DIR} ${source})
    list(APPEND files ${KL_OBJECTS_FROM}/CMakeFiles/${target}.dir/${source}.o)
  endforeach()
  set_source_files_properties(${files} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  set(${objects_name} ${files} PARENT_SCOPE)
endfunction()

define_property(GLOBAL PROPERTY KL_TEST_OBJECTS BRIEF_DOCS "objects of tests" FULL_DOCS "of every folder")
define_property(GLOBAL PROPERTY KL_TEST_FOLDERS BRIEF_DOCS "libraries under test" FULL_DOCS "of every folder")
define_property(GLOBAL PROPERTY KL_ARCHIVES BRIEF_DOCS "static libraries" FULL_DOCS "of every folder")
define_property(GLOBAL PROPERTY KL_TEST_FILES BRIEF_DOCS "object files of tests" FULL_DOCS "of KL_TESTS_FROM")

# The test libraries' headers, compiled once for all tests: they take a few seconds of every x_test.cc otherwise. The flags
# are those of the test objects below; a compiler that finds a difference says so (-Winvalid-pch, which CMake sets) and reads
# the headers as text.
function(kl_test_headers)
  file(WRITE ${CMAKE_BINARY_DIR}/test_headers.cc "// Holds nothing: its target owns the precompiled header of the tests.\n")
  add_library(kl_test_headers OBJECT EXCLUDE_FROM_ALL ${CMAKE_BINARY_DIR}/test_headers.cc)
  target_link_libraries(kl_test_headers PRIVATE kl_options GTest::gtest rapidcheck rapidcheck_gtest)
  target_compile_definitions(kl_test_headers PRIVATE KL_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  target_compile_options(kl_test_headers PRIVATE -O1)
  if(KL_SANITIZE MATCHES "undefined")
    target_compile_options(kl_test_headers PRIVATE -fno-sanitize=undefined)
  endif()
  target_precompile_headers(kl_test_headers PRIVATE <gtest/gtest.h> <rapidcheck/gtest.h> <algorithm> <map> <string> <vector>)
endfunction()

function(kl_folder folder)
  cmake_parse_arguments(ARG "" "" "DEPENDS;LIBRARIES" ${ARGN})
  string(REPLACE "/" "_" name ${folder})
  set(target kl_${name})
  set(dir ${CMAKE_SOURCE_DIR}/src/${folder})
  file(GLOB sources CONFIGURE_DEPENDS ${dir}/*.cc)
  file(GLOB cuda_sources CONFIGURE_DEPENDS ${dir}/*.cu)
  set(library_sources ${sources})
  list(FILTER library_sources EXCLUDE REGEX "_(test|bench|cpu)\\.cc$")
  set(isa_sources ${sources})
  list(FILTER isa_sources INCLUDE REGEX "_cpu\\.cc$")
  set(test_sources ${sources})
  list(FILTER test_sources INCLUDE REGEX "/(${KL_TEST_NAMES})\\.cc$")
  list(FILTER test_sources INCLUDE REGEX "_test\\.cc$")
  if(KL_CUDA)
    list(APPEND library_sources ${cuda_sources})
    file(GLOB headers CONFIGURE_DEPENDS ${dir}/*.h)
    foreach(header ${headers})
      file(STRINGS ${header} asks REGEX "${KL_ASKS_FOR_CUDA}" LIMIT_COUNT 1)
      if(asks)
        message(FATAL_ERROR "${header}: headers may not ask for KL_CUDA, or objects made without it are not what they would be")
      endif()
    endforeach()
  endif()

  if(library_sources OR isa_sources)
    kl_take_objects(taken library_sources ${target})
    add_library(${target} STATIC ${library_sources} ${taken})
    set_target_properties(${target} PROPERTIES LINKER_LANGUAGE CXX)
    set_property(TARGET ${target} APPEND PROPERTY KL_OBJECTS $<TARGET_OBJECTS:${target}> ${taken})
    set_property(GLOBAL APPEND PROPERTY KL_ARCHIVES ${target})
    set(scope PUBLIC)
  else()
    add_library(${target} INTERFACE)
    set(scope INTERFACE)
  endif()
  target_link_libraries(${target} ${scope} kl_options)
  foreach(below ${ARG_DEPENDS})
    string(REPLACE "/" "_" below ${below})
    target_link_libraries(${target} ${scope} kl_${below})
  endforeach()
  target_link_libraries(${target} ${scope} ${ARG_LIBRARIES})

  foreach(isa ${KL_ISAS})
    if(isa_sources AND KL_OBJECTS_FROM AND (NOT KL_SANITIZE OR isa IN_LIST KL_ISAS_NOT_RUN_HERE))
      kl_compiled(taken ${target}_${isa} ${isa_sources})
      target_sources(${target} PRIVATE ${taken})
      set_property(TARGET ${target} APPEND PROPERTY KL_OBJECTS ${taken})
    elseif(isa_sources)
      add_library(${target}_${isa} OBJECT ${isa_sources})
      target_compile_definitions(${target}_${isa} PRIVATE KL_ISA=${isa})
      if(isa IN_LIST KL_ISAS_NOT_RUN_HERE)
        target_compile_options(${target}_${isa} PRIVATE ${KL_ISA_FLAGS_${isa}})
        set_target_properties(${target}_${isa} PROPERTIES KL_NOT_RUN_HERE ON)
      else()
        target_compile_options(${target}_${isa} PRIVATE ${KL_KERNEL_FLAGS} ${KL_ISA_FLAGS_${isa}})
      endif()
      # The kernels are the work here, not the headers that one file of all would read once (CMAKE_UNITY_BUILD).
      set_target_properties(${target}_${isa} PROPERTIES UNITY_BUILD OFF)
      target_link_libraries(${target}_${isa} PRIVATE kl_options)
      target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${isa}>)
      set_property(TARGET ${target} APPEND PROPERTY KL_OBJECTS $<TARGET_OBJECTS:${target}_${isa}>)
    endif()
  endforeach()

  foreach(source ${cuda_sources})
    # CMake has architectures per target, not per file: sm_90a files get an object library of their own.
    if(KL_CUDA AND source MATCHES "_sm90\\.cu$")
      get_filename_component(stem ${source} NAME_WE)
      add_library(${target}_${stem} OBJECT ${source})
      set_target_properties(${target}_${stem} PROPERTIES CUDA_ARCHITECTURES 90a-real)
      target_link_libraries(${target}_${stem} PRIVATE kl_options)
      get_target_property(current ${target} SOURCES)
      list(REMOVE_ITEM current ${source})
      set_target_properties(${target} PROPERTIES SOURCES "${current}")
      target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${stem}>)
      set_property(TARGET ${target} APPEND PROPERTY KL_OBJECTS $<TARGET_OBJECTS:${target}_${stem}>)
    endif()
  endforeach()

  if(KL_CUDA)
    set(programs ${sources})
    list(FILTER programs INCLUDE REGEX "_cuda_bench\\.cc$")
    foreach(source ${programs})
      get_filename_component(stem ${source} NAME_WE)
      add_executable(${stem} EXCLUDE_FROM_ALL ${source})
      target_link_libraries(${stem} PRIVATE ${target} kl_testing)
    endforeach()
  endif()

  if(KL_TESTS AND test_sources)
    # A test on a GPU has its own names for what the one on the CPU names too.
    set(one_file OFF)
    if(KL_TEST_UNITY AND NOT "${test_sources}" MATCHES "_cuda_test")
      set(one_file ON)
    endif()
    set(compiled ${test_sources})
    if(one_file)
      set(compiled ${CMAKE_SOURCE_DIR}/Unity/unity_0_cxx.cxx)
    endif()
    foreach(source ${compiled})
      file(RELATIVE_PATH source ${CMAKE_SOURCE_DIR} ${source})
      set_property(GLOBAL APPEND PROPERTY KL_TEST_FILES ${KL_TESTS_FROM}/CMakeFiles/${target}_test_objects.dir/${source}.o)
    endforeach()
    set(objects)
    if(NOT one_file)
      kl_take_objects(objects test_sources ${target}_test_objects)
    endif()
    if(test_sources)
      kl_test_objects(${target} ${test_sources})
      set_target_properties(${target}_test_objects PROPERTIES UNITY_BUILD ${one_file} UNITY_BUILD_BATCH_SIZE 0)
      list(APPEND objects $<TARGET_OBJECTS:${target}_test_objects>)
    endif()
    set_property(GLOBAL APPEND PROPERTY KL_TEST_OBJECTS ${objects})
    set_property(GLOBAL APPEND PROPERTY KL_TEST_FOLDERS ${target})
    add_executable(${name}_tests EXCLUDE_FROM_ALL ${objects})
    set_target_properties(${name}_tests PROPERTIES LINKER_LANGUAGE CXX)
    target_link_libraries(${name}_tests PRIVATE ${target} kl_testing GTest::gtest_main rapidcheck)
  endif()
endfunction()

# The tests of a folder's library, compiled.
function(kl_test_objects target)
  add_library(${target}_test_objects OBJECT EXCLUDE_FROM_ALL ${ARGN})
  target_link_libraries(${target}_test_objects PRIVATE ${target} kl_testing GTest::gtest rapidcheck rapidcheck_gtest)
  target_compile_definitions(${target}_test_objects PRIVATE KL_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  target_compile_options(${target}_test_objects PRIVATE -O1)  # a third less time to build than with -O2
  if(TARGET kl_test_headers)
    target_precompile_headers(${target}_test_objects REUSE_FROM kl_test_headers)
    # In a precompiled header GCC 12 no longer knows what is the system's, and warns about its own std::string.
    target_compile_options(${target}_test_objects PRIVATE -Wno-array-bounds -Wno-restrict -Wno-stringop-overflow)
  endif()
  if(KL_SANITIZE MATCHES "undefined")  # in the code under test; in the tests it would double the time to build
    target_compile_options(${target}_test_objects PRIVATE -fno-sanitize=undefined)
  endif()
endfunction()

# An operator: a folder of src/ops, which may use the ground floor, the SIMD and the CUDA toolbox, and what else of
# that floor it names: kl_op(delta_net recurrence).
function(kl_op name)
  kl_folder(ops/${name} DEPENDS base simd cuda ${ARGN})
endfunction()

# kl_tests: every x_test.cc of every folder. Not built by default: the default is the product.
function(kl_test_programs)
  get_property(objects GLOBAL PROPERTY KL_TEST_OBJECTS)
  get_property(folders GLOBAL PROPERTY KL_TEST_FOLDERS)
  if(KL_TESTS_FROM)
    # A sanitizer's build tests the libraries that it made with the tests of another build: half as many files to compile. The
    # libraries come first and whole, so that of inline functions which both have the checked copy is taken.
    get_property(objects GLOBAL PROPERTY KL_TEST_FILES)
    set_source_files_properties(${objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
    get_property(archives GLOBAL PROPERTY KL_ARCHIVES)
    set(first)
    foreach(archive ${archives})
      list(APPEND first $<TARGET_FILE:${archive}>)
    endforeach()
  endif()
  add_executable(kl_tests EXCLUDE_FROM_ALL ${objects})
  set_target_properties(kl_tests PROPERTIES LINKER_LANGUAGE CXX)
  if(KL_TESTS_FROM)
    target_link_options(kl_tests PRIVATE -Wl,--whole-archive ${first} -Wl,--no-whole-archive)
  endif()
  target_link_libraries(kl_tests PRIVATE ${folders} kl_testing GTest::gtest_main rapidcheck)
endfunction()
