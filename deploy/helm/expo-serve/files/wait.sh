# Waits for the download of each source, given as id@revision.
for source in "$@"; do
  marker="$MODELS/.complete/$(printf %s "$source" | tr / %)"
  until [ -e "$marker" ]; do
    echo "waiting for $source"
    sleep 5
  done
done
