# libmoba_cuda.so: built for the GPU of this machine when there is one and nvcc is found, and for any
# GPU from sm_80 on when MOBA_CUDA=1 (or MOBA_CUDA_ARCHS, a list such as "80;90a") asks for it.
# Sets MOBA_CUDA_VERSION and MOBA_BUILT_ARCHS, both empty when the library is left out.
cmake_minimum_required(VERSION 3.24)
set(MOBA_CUDA_VERSION "")
set(MOBA_BUILT_ARCHS "")
set(MOBA_CUDA_HOW "set MOBA_CUDA=1 and install again")

if(NOT "${MOBA_CUDA}" MATCHES "^[01]?$")
  message(FATAL_ERROR "moba_ext does not know MOBA_CUDA=${MOBA_CUDA}: set it to 1 (build the CUDA "
    "library) or 0 (leave it out), or unset it (build it where a GPU is visible).")
endif()
if(MOBA_CUDA STREQUAL "0" AND MOBA_CUDA_ARCHS)
  message(FATAL_ERROR "moba_ext was told MOBA_CUDA=0 and MOBA_CUDA_ARCHS=${MOBA_CUDA_ARCHS}, which "
    "contradict each other: unset one of them.")
endif()
if(MOBA_CUDA STREQUAL "0")
  message(STATUS "moba_ext: no CUDA library (MOBA_CUDA=0); to get it, ${MOBA_CUDA_HOW}.")
  return()
endif()

# The toolkit: CUDACXX, CUDA_HOME, PATH, /usr/local/cuda, in this order. Looked for afresh every time.
unset(MOBA_NVCC CACHE)
if(DEFINED ENV{CUDACXX})
  set(MOBA_NVCC "$ENV{CUDACXX}")
else()
  find_program(MOBA_NVCC nvcc HINTS "$ENV{CUDA_HOME}/bin" PATHS /usr/local/cuda/bin)
endif()

if(MOBA_CUDA_ARCHS)
  set(archs ${MOBA_CUDA_ARCHS})
elseif(MOBA_CUDA STREQUAL "1")
  # sm_80 also carries PTX, for the GPUs that are newer than both.
  set(archs 80 90a)
else()
  # Is a GPU visible? Asked only where the answer can matter; the driver's tool needs a second or so.
  unset(MOBA_NVIDIA_SMI CACHE)
  find_program(MOBA_NVIDIA_SMI nvidia-smi)
  set(archs "")
  if(NOT MOBA_NVIDIA_SMI)
    set(reason "no GPU is visible")
  elseif(NOT MOBA_NVCC)
    set(reason "a GPU is visible but no nvcc was found")
    string(PREPEND MOBA_CUDA_HOW "install the CUDA toolkit, ")
  else()
    execute_process(COMMAND ${MOBA_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE output RESULT_VARIABLE result ERROR_QUIET TIMEOUT 15)
    set(reason "no GPU is visible")
    set(capabilities "")
    if(result EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${output}")
    endif()
    foreach(capability IN LISTS capabilities)
      if(capability VERSION_LESS 8.0)
        set(reason "the GPU has compute capability ${capability}, and 8.0 is the least supported")
      else()
        string(REPLACE "." "" arch ${capability})
        # wgmma and its kin exist only in the architecture-specific code of sm_90a.
        string(REGEX REPLACE "^90$" "90a" arch ${arch})
        list(APPEND archs ${arch})
      endif()
    endforeach()
    list(REMOVE_DUPLICATES archs)
  endif()
  if(NOT archs)
    message(STATUS "moba_ext: no CUDA library (${reason}); to get it, ${MOBA_CUDA_HOW}.")
    return()
  endif()
endif()

# 12.5 brought cudaGetDriverEntryPointByVersion, without which the TMA kernels would link the driver.
set(minimum 12.5)
if(NOT MOBA_NVCC)
  message(FATAL_ERROR "moba_ext was asked for its CUDA library, and no nvcc was found: install the CUDA "
    "toolkit ${minimum} or newer and put nvcc on PATH (or name it in CUDACXX), or set MOBA_CUDA=0.")
endif()
execute_process(COMMAND ${MOBA_NVCC} --version OUTPUT_VARIABLE output ERROR_VARIABLE output
  RESULT_VARIABLE result)
if(NOT result EQUAL 0 OR NOT output MATCHES "release ([0-9]+\\.[0-9]+)")
  message(FATAL_ERROR "moba_ext could not run ${MOBA_NVCC} --version: repair the CUDA toolkit or name "
    "another nvcc in CUDACXX, or set MOBA_CUDA=0 to do without the CUDA library.")
endif()
set(MOBA_CUDA_VERSION ${CMAKE_MATCH_1})
if(MOBA_CUDA_VERSION VERSION_LESS minimum)
  message(FATAL_ERROR "moba_ext needs nvcc ${minimum} or newer, but ${MOBA_NVCC} is "
    "${MOBA_CUDA_VERSION}: install a newer CUDA toolkit and name its nvcc in CUDACXX, or set MOBA_CUDA=0.")
endif()
execute_process(COMMAND ${MOBA_NVCC} --list-gpu-arch OUTPUT_VARIABLE output)
string(REGEX MATCHALL "[0-9]+" known "${output}")
foreach(arch IN LISTS archs)
  string(REGEX REPLACE "[af]$" "" number "${arch}")
  if(NOT number IN_LIST known OR number LESS 80)
    message(FATAL_ERROR "moba_ext cannot build for CUDA architecture \"${arch}\": set MOBA_CUDA_ARCHS to "
      "a list such as \"80;90a\", of 80 and up, that nvcc ${MOBA_CUDA_VERSION} knows (${known}).")
  endif()
endforeach()

set(MOBA_BUILT_ARCHS ${archs})
message(STATUS "moba_ext: CUDA library for ${archs} with nvcc ${MOBA_CUDA_VERSION}")
# Code for one chip ("90a") has no PTX that another could use.
list(TRANSFORM archs REPLACE "(.*[af])$" "\\1-real")
set(CMAKE_CUDA_COMPILER "${MOBA_NVCC}")
set(CMAKE_CUDA_ARCHITECTURES ${archs})
enable_language(CUDA)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
find_package(CUDAToolkit REQUIRED)

file(GLOB_RECURSE MOBA_CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)
add_library(moba_cuda MODULE csrc/plan.cpp ${MOBA_CUDA_SOURCES})
target_compile_definitions(moba_cuda PRIVATE USE_CUDA)
target_compile_options(moba_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo
  -Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage>)
target_link_libraries(moba_cuda PRIVATE moba_torch CUDA::cudart_static)
install(TARGETS moba_cuda LIBRARY DESTINATION lib)
list(APPEND MOBA_LIBRARIES cuda)
