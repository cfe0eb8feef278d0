# Downloads each source, given as id@revision, into the hub cache, and marks it once its checksums are the hub's.
# EXCLUDE holds patterns, one a line. A run that is cut off goes on where it was.
mkdir -p "$MODELS/.complete"
for source in "$@"; do
  id=${source%@*}
  revision=${source##*@}
  marker="$MODELS/.complete/$(printf %s "$source" | tr / %)"
  if [ -e "$marker" ]; then
    echo "$source: there already"
    continue
  fi
  set --
  while read -r pattern; do
    [ -z "$pattern" ] || set -- "$@" --exclude "$pattern"
  done <<PATTERNS
$EXCLUDE
PATTERNS
  hf download "$id" --revision "$revision" "$@"
  hf cache verify "$id" --revision "$revision"
  touch "$marker"
  echo "$source: complete"
done
