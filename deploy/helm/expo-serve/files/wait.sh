# Waits for the download of each source, given as id@revision.
# As process 1 the shell would ignore SIGTERM, and a pod that nobody wants any more would stay for its whole grace.
trap 'exit 143' TERM
for source in "$@"; do
  marker="$MODELS/.complete/$(printf %s "$source" | tr / %)"
  [ -e "$marker" ] || echo "waiting for $source"
  until [ -e "$marker" ]; do
    sleep 2
  done
done
