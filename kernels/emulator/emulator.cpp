#include "hydra_emulator.h"
#include "machine.h"

using hydra::emulator::machine;

int hydra_emulator_register(const void* p, size_t bytes, const char* name, int kind) {
  machine.message = machine.global.add(p, bytes, name, kind);
  return machine.message.empty() ? 0 : 1;
}

void hydra_emulator_forget(const void* p) { machine.global.remove(p); }

void hydra_emulator_clear() {
  machine.global.clear();
  machine.message.clear();
  machine.counters = {};
}

void hydra_emulator_schedule(int reverse) { machine.reverse = reverse != 0; }

void hydra_emulator_shared_limit(size_t bytes) { machine.shared_limit = bytes; }

const char* hydra_emulator_fault() { return machine.message.c_str(); }

void hydra_emulator_read_counters(hydra_emulator_counters* counters) {
  *counters = machine.counters;
}
