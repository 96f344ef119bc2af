/* Streams, events and graph capture. A stream's handle is a pointer to its `Stream`, an event's to its `StreamEvent`. */

#include "fake_cuda.h"
#include <stdio.h>
#include <time.h>

enum { STREAM_MAGIC = 0x57, EVENT_MAGIC = 0xe7 };
struct Stream {
  int magic, device, priority, blocking, capturing;
  int index;              /* in `streams` */
  long work;              /* issued to it since the capture began */
  long seen[MAX_STREAMS]; /* per stream: how much of its captured work precedes what comes next here */
};
typedef struct {
  int magic, device, timed, recorded;
  long capture; /* in which it was recorded last, 0 outside of any */
  long *seen;   /* by its stream when it was recorded in a capture */
  struct timespec time;
} StreamEvent;

static Stream *streams[MAX_STREAMS];
static int stream_count = MAX_DEVICES; /* the first are the devices' legacy streams, which are made when they are used */
static struct {
  int active, invalid;
  char reason[200]; /* for being invalid */
  enum cudaStreamCaptureMode mode;
  long id;
  Stream *origin;
  pthread_t thread;
} capture;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static Stream *new_stream(int index, unsigned flags, int priority) {
  Stream *stream = calloc(1, sizeof *stream);
  *stream = (Stream){STREAM_MAGIC, current, priority, .blocking = !(flags & cudaStreamNonBlocking), .index = index};
  return streams[index] = stream;
}
static int is_legacy(const Stream *stream) { return stream->index < MAX_DEVICES; }

Stream *stream_of(cudaStream_t handle) {
  attach();
  if (!handle || handle == cudaStreamLegacy || handle == cudaStreamPerThread) {
    Stream *legacy;
    LOCKED legacy = streams[current] ? streams[current] : new_stream(current, 0, 0);
    return legacy;
  }
  Stream *stream = (Stream *)handle;
  if (stream->magic == STREAM_MAGIC) return stream;
  refuse(cudaErrorInvalidResourceHandle, "%p is no stream", (void *)handle);
  return NULL;
}

int is_capturing(cudaStream_t handle) {
  Stream *stream = stream_of(handle);
  return stream && stream->capturing;
}
int device_of_stream(const Stream *stream) { return stream->device; }

int invalidate(int code, const char *what) {
  if (capture.active && !capture.invalid) {
    capture.invalid = 1;
    snprintf(capture.reason, sizeof capture.reason, "%s", what);
  }
  return refuse(code, "%s during a capture", what);
}
int prohibits_unsafe_calls(void) {
  if (!capture.active || thread_mode == cudaStreamCaptureModeRelaxed) return 0;
  if (capture.mode == cudaStreamCaptureModeThreadLocal) return pthread_equal(capture.thread, pthread_self());
  return capture.mode == cudaStreamCaptureModeGlobal;
}

/* The legacy stream waits for blocking streams, which a capture forbids. Beside the others its work is legal, but no part of
   the graph: reported, not refused. */
static cudaError_t beside_capture(const Stream *stream, const char *what) {
  if (!capture.active || !is_legacy(stream) || capture.origin->device != stream->device) return cudaSuccess;
  if (capture.origin->blocking) return invalidate(cudaErrorStreamCaptureImplicit, what);
  if (pthread_equal(capture.thread, pthread_self()) && thread_mode != cudaStreamCaptureModeRelaxed) {
    refuse(cudaSuccess, "%s on the legacy stream during a capture is not captured", what);
  }
  return cudaSuccess;
}

cudaError_t issue(cudaStream_t handle, const char *what) {
  Stream *stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (stream->device != current)
    return refuse(cudaErrorInvalidResourceHandle, "%s: the stream is of device %d, the current device is %d", what,
                  stream->device, current);
  if (stream->capturing) LOCKED stream->seen[stream->index] = ++stream->work;
  return beside_capture(stream, what);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *handle, unsigned flags, int priority) {
  attach();
  if (stream_count == MAX_STREAMS) return refuse(cudaErrorMemoryAllocation, "more than %d streams", MAX_STREAMS);
  LOCKED *handle = (cudaStream_t)new_stream(stream_count++, flags, priority);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *handle, unsigned flags) {
  return cudaStreamCreateWithPriority(handle, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t handle) { /* kept, so that a use after it is seen */
  Stream *stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  return stream->magic = 0, cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority) {
  Stream *stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  return *priority = stream->priority, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Stream *stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  note_wait(WAIT_STREAM, "cudaStreamSynchronize", handle);
  if (stream->capturing) return invalidate(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize of a captured stream");
  UNSAFE("cudaStreamSynchronize");
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Stream *stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  NOTE(QUERY, "cudaStreamQuery", .stream = (uint64_t)handle);
  if (stream->capturing) return invalidate(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery of a captured stream");
  UNSAFE("cudaStreamQuery");
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
  attach();
  note_wait(WAIT_DEVICE, "cudaDeviceSynchronize", NULL);
  return capture.active ? invalidate(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize") : cudaSuccess;
}

static StreamEvent *event_of(cudaEvent_t handle) {
  StreamEvent *event = (StreamEvent *)handle;
  if (event && event->magic == EVENT_MAGIC) return event;
  refuse(cudaErrorInvalidResourceHandle, "%p is no event", (void *)handle);
  return NULL;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *handle, unsigned flags) {
  attach();
  StreamEvent *event = calloc(1, sizeof *event);
  *event = (StreamEvent){EVENT_MAGIC, current, .timed = !(flags & cudaEventDisableTiming)};
  return *handle = (cudaEvent_t)event, cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *handle) { return cudaEventCreateWithFlags(handle, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) { /* kept, so that a use after it is seen */
  StreamEvent *event = event_of(handle);
  if (!event) return cudaErrorInvalidResourceHandle;
  free(event->seen);
  return *event = (StreamEvent){0}, cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned flags) {
  StreamEvent *event = event_of(handle);
  Stream *stream = stream_of(stream_handle);
  if (!event || !stream) return cudaErrorInvalidResourceHandle;
  if (event->device != stream->device)
    return refuse(cudaErrorInvalidResourceHandle, "event of device %d recorded on a stream of device %d", event->device,
                  stream->device);
  cudaError_t error = beside_capture(stream, "cudaEventRecord");
  if (error) return error;
  NOTE(RECORD_EVENT, "cudaEventRecord", .stream = (uint64_t)stream_handle);
  event->recorded = 1;
  event->capture = stream->capturing ? capture.id : 0;
  if (stream->capturing) LOCKED {
      if (!event->seen) event->seen = malloc(sizeof stream->seen);
      memcpy(event->seen, stream->seen, sizeof stream->seen);
    }
  clock_gettime(CLOCK_MONOTONIC, &event->time);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }

static int is_captured(const StreamEvent *event) { return capture.active && event->capture == capture.id; }
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  StreamEvent *event = event_of(handle);
  if (!event) return cudaErrorInvalidResourceHandle;
  NOTE(QUERY, "cudaEventQuery");
  UNSAFE("cudaEventQuery");
  return is_captured(event) ? invalidate(cudaErrorCapturedEvent, "cudaEventQuery of a captured event") : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  StreamEvent *event = event_of(handle);
  if (!event) return cudaErrorInvalidResourceHandle;
  note_wait(WAIT_EVENT, "cudaEventSynchronize", NULL);
  UNSAFE("cudaEventSynchronize");
  return is_captured(event) ? invalidate(cudaErrorCapturedEvent, "cudaEventSynchronize of a captured event") : cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start_handle, cudaEvent_t end_handle) {
  StreamEvent *start = event_of(start_handle), *end = event_of(end_handle);
  if (!start || !end) return cudaErrorInvalidResourceHandle;
  if (!start->recorded || !end->recorded || !start->timed || !end->timed || start->capture || end->capture)
    return refuse(cudaErrorInvalidResourceHandle, "elapsed time of events that were not recorded, not timed or captured");
  *milliseconds = (end->time.tv_sec - start->time.tv_sec) * 1e3 + (end->time.tv_nsec - start->time.tv_nsec) * 1e-6;
  if (*milliseconds <= 0) *milliseconds = 1e-3;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned flags) {
  Stream *stream = stream_of(stream_handle);
  StreamEvent *event = event_of(handle);
  if (!event || !stream) return cudaErrorInvalidResourceHandle;
  NOTE(STREAM_WAIT, "cudaStreamWaitEvent", .stream = (uint64_t)stream_handle);
  if (!event->recorded) return cudaSuccess;
  if (!event->capture)
    return stream->capturing ? invalidate(cudaErrorStreamCaptureIsolation, "wait for an event from outside") : cudaSuccess;
  if (!is_captured(event)) return refuse(cudaErrorStreamCaptureIsolation, "wait for an event of another capture");
  if (is_legacy(stream)) return invalidate(cudaErrorStreamCaptureImplicit, "wait of the legacy stream for a captured event");
  LOCKED {
    if (!stream->capturing) memset(stream->seen, 0, sizeof stream->seen), stream->work = 0, stream->capturing = 1;
    for (int i = 0; i < stream_count; i++)
      if (event->seen[i] > stream->seen[i]) stream->seen[i] = event->seen[i];
  }
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
  Stream *stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (is_legacy(stream)) return refuse(cudaErrorStreamCaptureUnsupported, "capture of the legacy stream");
  if (capture.active) return refuse(cudaErrorNotSupported, "two captures at a time are not modelled");
  memset(stream->seen, 0, sizeof stream->seen), stream->work = 0, stream->capturing = 1;
  capture.active = 1, capture.invalid = 0, capture.mode = mode, capture.id++, capture.origin = stream,
  capture.thread = pthread_self();
  NOTE(CAPTURE, "cudaStreamBeginCapture", .stream = (uint64_t)handle);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
  Stream *stream = stream_of(handle);
  *graph = NULL;
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (!capture.active || stream != capture.origin)
    return refuse(cudaErrorIllegalState, "the end of a capture that did not begin here");
  cudaError_t error = cudaSuccess;
  if (capture.invalid) error = refuse(cudaErrorStreamCaptureInvalidated, "the capture was invalidated: %s", capture.reason);
  LOCKED
    for (int i = 0; i < stream_count; i++) {
      Stream *forked = streams[i];
      if (!forked || !forked->capturing) continue;
      if (forked != stream && stream->seen[i] < forked->work)
        error = refuse(cudaErrorStreamCaptureUnjoined, "the capture ended before a forked stream was joined");
      forked->capturing = 0;
    }
  capture.active = 0;
  if (error) return error;
  return *graph = malloc(1), cudaSuccess;
}
cudaError_t capture_status(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
  Stream *stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  *status = !stream->capturing ? cudaStreamCaptureStatusNone
            : capture.invalid  ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
  return capture_status(handle, status);
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  static char placeholder; /* for the graph under construction, whose nodes nobody can read */
  cudaError_t error = capture_status(handle, status);
  if (id) *id = error || *status == cudaStreamCaptureStatusNone ? 0 : capture.id;
  if (graph) *graph = (cudaGraph_t)&placeholder;
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return error;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = thread_mode;
  return thread_mode = *mode, *mode = before, cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
  if (!graph) return refuse(cudaErrorInvalidValue, "no graph");
  return *executable = malloc(1), cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  cudaError_t error = issue(stream, "cudaGraphLaunch");
  if (error) return error;
  NOTE(GRAPH_LAUNCH, "cudaGraphLaunch", .stream = (uint64_t)stream);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return free(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return free(executable), cudaSuccess; }
