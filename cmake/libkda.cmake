# libkda: the operator behind the C interface of include/kda/kda.h, as a shared and a static library; what is installed
# (cmake --install BUILD --component libkda --prefix PREFIX) and the example. docs/libkda.md is the user's side of it.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

# The interface's version is the library's: the header says it once.
foreach(part MAJOR MINOR)
  file(STRINGS ${CMAKE_SOURCE_DIR}/include/kda/kda.h line REGEX "#define KDA_ABI_${part} ")
  string(REGEX MATCH "[0-9]+" KDA_ABI_${part} "${line}")
endforeach()
set(KDA_VERSION ${KDA_ABI_MAJOR}.${KDA_ABI_MINOR})
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/include/kda/kda.h)

add_library(kda SHARED src/ops/kda/kda_c.cc)
target_link_libraries(kda PRIVATE kl_ops_kda)
target_include_directories(kda PUBLIC ${CMAKE_SOURCE_DIR}/include)
set(KDA_MAP ${CMAKE_SOURCE_DIR}/src/ops/kda/kda.map)
target_link_options(kda PRIVATE -Wl,--version-script=${KDA_MAP})
if(NOT KL_SANITIZE)  # whose runtime is in the program
  target_link_options(kda PRIVATE -Wl,--no-undefined)
endif()
set_target_properties(kda PROPERTIES CXX_VISIBILITY_PRESET hidden VERSION ${KDA_VERSION} SOVERSION ${KDA_ABI_MAJOR}
  LINK_DEPENDS ${KDA_MAP})

# One archive of all objects that the operator stands on: whoever links it needs a C++ runtime and threads, and no library of ours.
set(objects)
foreach(part kl_base kl_simd kl_cuda kl_ops_kda)
  get_target_property(part_objects ${part} KL_OBJECTS)
  if(part_objects)
    list(APPEND objects ${part_objects})
  endif()
endforeach()
add_library(kda_static STATIC ${objects})
target_include_directories(kda_static PUBLIC ${CMAKE_SOURCE_DIR}/include)
set_target_properties(kda_static PROPERTIES OUTPUT_NAME kda LINKER_LANGUAGE CXX)

add_executable(kda_prefill_example examples/kda_prefill.c)
target_link_libraries(kda_prefill_example PRIVATE kl_options kda m)
target_compile_options(kda_prefill_example PRIVATE -Wall -Wextra)
if(KL_CUDA)
  add_executable(kda_decode_example EXCLUDE_FROM_ALL examples/kda_decode.c)
  target_link_libraries(kda_decode_example PRIVATE kda CUDA::cudart_static)
endif()

set(KDA_PC_LIBS_PRIVATE "-lstdc++ -lm -pthread")
if(KL_CUDA)
  string(APPEND KDA_PC_LIBS_PRIVATE " -L${CUDAToolkit_LIBRARY_DIR} -lcudart_static -ldl -lrt")
endif()
set(KDA_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/kda)
file(RELATIVE_PATH KDA_PC_TO_PREFIX /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
string(REGEX REPLACE "/$" "" KDA_PC_TO_PREFIX "${KDA_PC_TO_PREFIX}")
set(KDA_GENERATED ${CMAKE_BINARY_DIR}/libkda)
configure_file(${CMAKE_SOURCE_DIR}/cmake/kda.pc.in ${KDA_GENERATED}/kda.pc @ONLY)
configure_package_config_file(${CMAKE_SOURCE_DIR}/cmake/kdaConfig.cmake.in ${KDA_GENERATED}/kdaConfig.cmake
  INSTALL_DESTINATION ${KDA_PACKAGE_DIR} PATH_VARS CMAKE_INSTALL_INCLUDEDIR CMAKE_INSTALL_LIBDIR)
write_basic_package_version_file(${KDA_GENERATED}/kdaConfigVersion.cmake VERSION ${KDA_VERSION}
  COMPATIBILITY SameMajorVersion)

install(TARGETS kda kda_static COMPONENT libkda
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} NAMELINK_COMPONENT libkda
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES include/kda/kda.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kda COMPONENT libkda)
install(FILES ${KDA_GENERATED}/kda.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT libkda)
install(FILES ${KDA_GENERATED}/kdaConfig.cmake ${KDA_GENERATED}/kdaConfigVersion.cmake DESTINATION ${KDA_PACKAGE_DIR}
  COMPONENT libkda)
