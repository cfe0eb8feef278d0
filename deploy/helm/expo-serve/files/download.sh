# Downloads each source, given as id@revision, into the hub cache, and marks it once its checksums are the hub's.
# EXCLUDE holds patterns, one a line. A run keeps every file that an earlier one has completed.
export HF_HUB_DISABLE_UPDATE_CHECK=1 NO_COLOR=1

fail() {
  echo "$source: $1; the next run keeps the files that are complete" >&2
  exit 1
}

# Removes the files that a verification has found damaged: the next run would take them for complete ones. A file lies in
# the cache under the checksum that it should have.
remove_damaged() {
  sed -n 's/^  - .*: expected \([0-9a-f]*\) (.*/\1/p' | while read -r checksum; do
    blob="$HF_HUB_CACHE/models--$(printf %s "$id" | sed 's|/|--|')/blobs/$checksum"
    rm -f "$(readlink -f "$blob")" "$blob"
  done
}

mkdir -p "$MODELS/.complete" "$HF_HUB_CACHE"
# Nobody goes on with the unfinished file of a run that was killed. One that was written lately may be another Job's.
find "$HF_HUB_CACHE" -name '*.incomplete' -mmin +60 -delete || :
for source in "$@"; do
  id=${source%@*}
  revision=${source##*@}
  marker="$MODELS/.complete/$(printf %s "$source" | tr / %)"
  # The marker holds what was left out: with other patterns there may be more to download.
  if [ -e "$marker" ] && [ "$(cat "$marker")" = "$EXCLUDE" ]; then
    echo "$source: there already"
    continue
  fi
  set --
  while read -r pattern; do
    [ -z "$pattern" ] || set -- "$@" --exclude "$pattern"
  done <<PATTERNS
$EXCLUDE
PATTERNS
  hf download "$id" --revision "$revision" "$@" || fail "the download failed"
  if ! report=$(hf cache verify "$id" --revision "$revision"); then
    printf '%s\n' "$report" >&2
    printf '%s\n' "$report" | remove_damaged
    fail "the files cannot be shown to be the hub's"
  fi
  printf %s "$EXCLUDE" >"$marker"
  echo "$source: complete"
done
