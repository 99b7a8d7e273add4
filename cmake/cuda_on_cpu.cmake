# cuda_on_cpu_tests: the CUDA kernels and their tests where there is neither nvcc nor a GPU. src/testing/cuda_on_cpu stands in
# for CUDA's headers and for cuda/ptx.cuh, and runs the kernels (machine.h there says how). Not built by default.
#
#   kl_cuda_on_cpu(ops/kda ops/norm)     every x.cu of these folders, every x.cc that asks for KL_CUDA, every test for a GPU
function(kl_cuda_on_cpu)
  set(dir ${CMAKE_SOURCE_DIR}/src/testing/cuda_on_cpu)
  file(GLOB machine CONFIGURE_DEPENDS ${dir}/*.cc)
  file(GLOB tests CONFIGURE_DEPENDS ${dir}/*_test.cc)
  list(FILTER machine EXCLUDE REGEX "_test\\.cc$")
  set(kernels)
  set(switches)
  set(libraries)
  foreach(folder ${ARGN})
    string(REPLACE "/" "_" name ${folder})
    list(APPEND libraries kl_${name})
    file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/${folder}/*.cc)
    foreach(source ${sources})
      if(source MATCHES "_test\\.cc$")
        file(STRINGS ${source} on_a_gpu REGEX "device_present|KL_NEEDS_GPU" LIMIT_COUNT 1)
        if(on_a_gpu)
          list(APPEND tests ${source})
        endif()
      elseif(NOT source MATCHES "_(bench|cpu)\\.cc$")
        file(STRINGS ${source} asks REGEX "${KL_ASKS_FOR_CUDA}" LIMIT_COUNT 1)
        if(asks)
          list(APPEND switches ${source})
        endif()
      endif()
    endforeach()
    file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/${folder}/*.cu)
    foreach(source ${sources})
      kl_kernel_on_cpu(wrapper ${source})
      list(APPEND kernels ${wrapper})
    endforeach()
  endforeach()

  add_executable(cuda_on_cpu_tests EXCLUDE_FROM_ALL ${machine} ${kernels} ${switches} ${tests})
  target_include_directories(cuda_on_cpu_tests BEFORE PRIVATE ${dir})
  target_compile_definitions(cuda_on_cpu_tests PRIVATE KL_CUDA=1 KL_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  # A block's shared memory is thread-local, and arrays have no constructors that a thread would have to look for. Tensor maps
  # are parameters aligned to 64 bytes, about which GCC has a note.
  target_compile_options(cuda_on_cpu_tests PRIVATE -O2 -Wno-unknown-pragmas
    $<$<CXX_COMPILER_ID:GNU>:-fno-extern-tls-init -Wno-psabi>)
  set_source_files_properties(${tests} TARGET_DIRECTORY cuda_on_cpu_tests PROPERTIES COMPILE_OPTIONS -O1)
  # An access of a kernel that is not aligned to its type traps, as on a GPU; the machine says which thread it was.
  set(aligned -fsanitize=alignment $<IF:$<CXX_COMPILER_ID:GNU>,-fsanitize-undefined-trap-on-error,-fsanitize-trap=alignment>)
  set_source_files_properties(${kernels} ${dir}/machine_test.cc TARGET_DIRECTORY cuda_on_cpu_tests
    PROPERTIES COMPILE_OPTIONS "${aligned}")
  set_target_properties(cuda_on_cpu_tests PROPERTIES UNITY_BUILD OFF)
  # What is compiled here comes before what these libraries have of the same names.
  target_link_libraries(cuda_on_cpu_tests PRIVATE ${libraries} kl_testing GTest::gtest_main rapidcheck rapidcheck_gtest)
endfunction()

# kl_kernel_on_cpu(WRAPPER SOURCE): a C++ file that includes x.cu. Behind it stands the dynamic shared memory that a kernel
# there declares under a name of its own, as much as a block can have.
function(kl_kernel_on_cpu wrapper_name source)
  file(RELATIVE_PATH path ${CMAKE_SOURCE_DIR}/src ${source})
  set(content "#include \"${path}\"\n")
  file(STRINGS ${source} shared REGEX "extern __shared__")
  if(shared MATCHES "([A-Za-z_0-9]+) ([a-z_]+)\\[\\]")
    set(type ${CMAKE_MATCH_1})
    set(name ${CMAKE_MATCH_2})
    string(APPEND content "namespace kl::cuda {\nnamespace {\n"
      "alignas(1024) thread_local ${type} ${name}[232448 / sizeof(${type})];\n"
      "const cuda_on_cpu::DynamicMemory dynamic_memory([] { return reinterpret_cast<char*>(${name}); });\n"
      "}\n}\n")
  endif()
  string(REGEX REPLACE "[/.]" "_" stem ${path})
  set(wrapper ${CMAKE_BINARY_DIR}/cuda_on_cpu/${stem}.cc)
  file(CONFIGURE OUTPUT ${wrapper} CONTENT "${content}" @ONLY)
  set(${wrapper_name} ${wrapper} PARENT_SCOPE)
endfunction()
