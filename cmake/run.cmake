# quern-run, a static program, and libquern.a, which it is made of: csrc/include/quern.h shows what it can do. Included by
# CMakeLists.txt where QUERN_RUN is on.
file(GLOB RUN_SOURCES CONFIGURE_DEPENDS csrc/run/*.cc)
list(REMOVE_ITEM RUN_SOURCES ${CMAKE_CURRENT_SOURCE_DIR}/csrc/run/main.cc)

add_library(quern STATIC ${RUN_SOURCES})
target_include_directories(quern PUBLIC ${CMAKE_CURRENT_SOURCE_DIR}/csrc/include)
target_link_libraries(quern PUBLIC quern_core)

add_executable(quern-run csrc/run/main.cc)
target_link_libraries(quern-run PRIVATE quern)
# What nothing calls is left out of the program.
target_compile_options(quern_flags INTERFACE -ffunction-sections -fdata-sections)
target_link_options(quern-run PRIVATE -Wl,--gc-sections)
if(NOT QUERN_SANITIZE)
  target_link_options(quern-run PRIVATE -static -s)
endif()
