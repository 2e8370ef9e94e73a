# Sourced by local.sh: starts the command `run` as `processes` processes of this machine, which meet
# over loopback, and exits with the status of the first that fails.
port=PORT
if [[ ! $dry_run ]]; then
  port=$("$python" -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
fi
set -m # a process group for each: Ctrl-C reaches it once, by `forward`
pids=()
for ((i = 0; i < processes; i++)); do
  command=("${run[@]}" "--coordinator=127.0.0.1:$port" "--process_id=$i" "--num_processes=$processes")
  if [[ $dry_run ]]; then
    "${command[@]}"
    continue
  fi
  # Only the first prints to standard output; errors of the others are seen all the same.
  if ((i)); then exec 8>/dev/null; else exec 8>&1; fi
  "${command[@]}" </dev/null >&8 8>&- &
  pids+=($!)
done

forwarded="" status=0 killer=""
forward() { forwarded=yes && kill -s "$1" "${pids[@]}" 2>/dev/null || true; }
for signal in INT TERM HUP; do trap "forward $signal" "$signal"; done
while [[ ! $dry_run ]]; do
  code=0 forwarded=""
  wait -n || code=$?
  ((code != 127)) || break # all have ended
  if [[ ! $forwarded ]] && ((code && !status)); then
    status=$code
    # The others will fail too, and may have more to say; but not forever.
    exec 2>/dev/null # their own is open; this shell would only tell who was killed below
    { sleep 10 && kill -s KILL "${pids[@]}"; } >/dev/null 2>&1 &
    killer=$!
    disown
  fi
done
[[ ! $killer ]] || kill -- "-$killer" 2>/dev/null || true
exit "$status"
