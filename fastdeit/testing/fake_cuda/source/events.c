/* Counts, events and errors: what tests read. */

#include "fake_cuda.h"
#include <stdarg.h>
#include <stdio.h>

pthread_mutex_t fake_cuda_mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

#define NAME(id, name) name,
static const char *const kind_names[] = {KINDS(NAME)};

static long counts[KIND_COUNT];
static Event *events;
static long event_count, event_capacity;
int recording, checks_pointers = 1;
static char **errors;
static long error_count;
static void (*observer)(const char *what); /* called at each wait and error, in the thread that causes it */

static __thread cudaError_t last_error;
static __thread char message[512] = "no error";

EXPORTED const char *fake_cuda_kind(int kind) { return kind >= 0 && kind < KIND_COUNT ? kind_names[kind] : NULL; }
EXPORTED long fake_cuda_count(int kind) {
  return kind >= 0 && kind < KIND_COUNT ? __atomic_load_n(&counts[kind], __ATOMIC_RELAXED) : -1;
}
EXPORTED long fake_cuda_events(void) { return event_count; }
EXPORTED const Event *fake_cuda_event(long i) { return i >= 0 && i < event_count ? &events[i] : NULL; }
EXPORTED long fake_cuda_errors(void) { return error_count; }
EXPORTED const char *fake_cuda_error(long i) { return i >= 0 && i < error_count ? errors[i] : NULL; }
EXPORTED void fake_cuda_observe(void (*function)(const char *)) { observer = function; }
EXPORTED void fake_cuda_check_pointers(int on) { checks_pointers = on; }

EXPORTED void fake_cuda_record(int on) {
  LOCKED {
    for (long i = 0; on && i < event_count; i++) free(events[i].name), free(events[i].arguments);
    if (on) event_count = 0;
    recording = on;
  }
}

void note_event(Event event, const char *name, void **arguments) {
  __atomic_fetch_add(&counts[event.kind], 1, __ATOMIC_RELAXED);
  if (!recording) return;
  LOCKED {
    event.device = current;
    event.name = strdup(name);
    size_t total = 0;
    for (int i = 0; i < event.count; i++) total += event.size[i];
    if (total) event.arguments = malloc(total);
    for (int i = 0, at = 0; i < event.count; at += event.size[i++]) memcpy(event.arguments + at, arguments[i], event.size[i]);
    if (event_count == event_capacity) {
      event_capacity = event_capacity ? 2 * event_capacity : 1024;
      events = realloc(events, event_capacity * sizeof *events);
    }
    events[event_count++] = event;
  }
}

void note_wait(int kind, const char *name, cudaStream_t stream) {
  NOTE(kind, name, .stream = (uint64_t)stream);
  if (observer) observer(name);
}

static void keep_error(const char *format, va_list arguments) {
  vsnprintf(message, sizeof message, format, arguments);
  LOCKED {
    errors = realloc(errors, (error_count + 1) * sizeof *errors);
    errors[error_count++] = strdup(message);
  }
  NOTE(ERROR, message);
  if (observer) observer(message);
}
int refuse(int code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  keep_error(format, arguments);
  va_end(arguments);
  return last_error = code;
}
int refuse_in_driver(int code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  keep_error(format, arguments);
  va_end(arguments);
  return code;
}
int refuse_quietly(int code, const char *text) {
  strcpy(message, text);
  return last_error = code;
}

const char *last_message(void) { return message; }

cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t error) { return error ? "an error of the fake CUDA runtime" : "cudaSuccess"; }
const char *cudaGetErrorString(cudaError_t error) {
  static __thread char text[600];
  if (!error) return "no error";
  snprintf(text, sizeof text, "fake CUDA error %d: %s", error, message);
  return text;
}
