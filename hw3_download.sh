#!/usr/bin/env bash
# Download what the full size needs: models into weights/, GPT-2 and data into hw3_data/.
#
#   bash hw3_download.sh [PART]        download p1, p2 and data, or a part; run it again to resume
#   bash hw3_download.sh check [PART]  verify the checksum of every file and read every image
#
#   p1    LLaVA-1.5-7B and the CLIP that scores      p2    GPT-2, the encoders and the CLIP that scores
#   data  the course's hw3_data.zip if HW3_DATA_ID names it on Google Drive (gdown), else a stand-in from COCO 2017
#   best-336, best-h, best-g  the larger encoder of that setting of p2_train.py (docs/training.md)
#
# curl fetches every file of the manifest from a URL with its revision into FILE.part, which is verified and renamed:
# a file under its own name is complete. The Hugging Face hub's own client would need the hub's API; curl needs only
# HTTP, so any mirror works, proxies are set by the usual variables, and a small server can test every failure.
#
# Environment: HF_ENDPOINT, HF_TOKEN, COCO_BASE_URL, GITHUB_RAW_URL, HW3_DATA_ID, PYTHON, proxies as curl knows them;
# HW3_ROOT (where hw3_data/ and weights/ go), HW3_MANIFEST, HW3_TRIES, HW3_STALL_SECONDS, HW3_BACKOFF_SECONDS,
# HW3_TRAIN_IMAGES and HW3_VAL_IMAGES (size of the stand-in).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=${HW3_ROOT:-$here}
manifest=${HW3_MANIFEST:-$here/hw3_download.tsv}
hub=${HF_ENDPOINT:-https://huggingface.co}
coco=${COCO_BASE_URL:-http://images.cocodataset.org}
github=${GITHUB_RAW_URL:-https://raw.githubusercontent.com}
tries=${HW3_TRIES:-8}
stall=${HW3_STALL_SECONDS:-60}
backoff=${HW3_BACKOFF_SECONDS:-5}
train_images=${HW3_TRAIN_IMAGES:-10000}
val_images=${HW3_VAL_IMAGES:-2000}
images=$((train_images + val_images + 5)) # of the stand-in; five are for p3_data
image_bytes=163500                        # average size of an image of COCO 2017
record=$root/weights/fetched.sha256       # checksums of downloaded files for which the manifest has none
longest_wait=600                          # seconds; not worth waiting for a server that asks for more
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python
  [[ ! -x $here/.venv/bin/python ]] || PYTHON=$here/.venv/bin/python
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
headers=$scratch/headers
again="bash hw3_download.sh"

say() { printf '%s\n' "$*"; }

fail() {
  printf 'error: %s\n' "$1" >&2
  printf 'run again: %s\n' "$again" >&2
  exit 1
}

readable() { awk -v n="$1" 'BEGIN {
  if (n >= 1e9) printf "%.1f GB", n / 1e9; else if (n >= 1e6) printf "%.1f MB", n / 1e6; else printf "%.0f kB", n / 1e3
}'; }

size_of() { if [[ -f $1 ]]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

sha256_of() {
  if command -v sha256sum >/dev/null; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -d ' ' -f 1
}

# The manifest's lines for a part, or for all but larger encoders: path, source, revision, bytes, sha256.
rows() {
  awk -F '\t' -v part="$1" '
    !/^#/ && NF && (part == "all" ? $1 !~ /^best-/ : ("," $1 ",") ~ ("," part ",")) { print }' "$manifest" | cut -f 2-
}

# --- one file, one URL ----------------------------------------------------------------------------------------------

url_of() { # source revision
  local path=${1#*:}
  case $1 in
    hf:*/*/*) say "$hub/$(cut -d / -f 1-2 <<<"$path")/resolve/$2/$(cut -d / -f 3- <<<"$path")" ;;
    github:*/*/*) say "$github/$(cut -d / -f 1-2 <<<"$path")/$2/$(cut -d / -f 3- <<<"$path")" ;;
    coco:*) say "$coco/$path" ;;
    *) fail "$manifest: the source $1 is none of hf:OWNER/REPO/FILE, github:OWNER/REPO/FILE and coco:FILE" ;;
  esac
}

# The last value of a header over all redirects; the hub gives a file's checksum with the first of them.
header() {
  tr -d '\r"' <"$headers" | awk -F ': *' -v name="$1" 'tolower($1) == name { value = $2 } END { print value }'
}

# One attempt to fetch the rest of file $2 from URL $1; prints the HTTP status, returns curl's exit code.
attempt() {
  : >"$headers"
  : >"$scratch/stderr"
  local token=() show=(--silent --show-error) errors=$scratch/stderr
  if [[ -t 2 ]]; then # a terminal: show curl's progress bar and messages there
    show=(--progress-bar)
    errors=/dev/stderr
  fi
  if [[ -n ${HF_TOKEN:-} && $1 == "$hub"/* ]]; then # in a file: every user can read a command line
    printf 'header = "Authorization: Bearer %s"\n' "$HF_TOKEN" >"$scratch/token"
    token=(--config "$scratch/token")
  fi
  curl --fail --location "${show[@]}" --connect-timeout 30 --speed-limit 1000 --speed-time "$stall" \
    ${token[@]+"${token[@]}"} --continue-at - --dump-header "$headers" --write-out '%{http_code}' --output "$2" \
    -- "$1" 2>"$errors"
}

# After a failed attempt: returns 0 to try again, 1 if the part file is already complete; fails if retrying is useless.
consider() { # curl's exit code, HTTP status, URL, part file, name
  case $1/$2 in
    22/416) # nothing is left to fetch, or the part file is of another version
      if [[ $(header content-range) == "bytes */$(size_of "$4")" ]]; then return 1; fi
      rm -f "$4"
      ;;
    22/404 | 22/410) fail "$5: the server has no such file ($3, HTTP $2); is the mirror complete?" ;;
    22/401 | 22/403) fail "$5: the server refuses it ($3, HTTP $2); set HF_TOKEN, or ask the mirror's owner" ;;
    22/408 | 22/425 | 22/429 | 22/5*) return 0 ;;
    22/*) fail "$5: HTTP $2 from $3" ;;
    33/*) rm -f "$4" ;; # the server can't resume
    3/* | 23/* | 60/*) fail "$5: curl: $(tail -n 1 "$scratch/stderr") ($3)" ;;
  esac
}

pause() { # number of the attempt
  local wait=$((backoff * $1)) asked
  asked=$(header retry-after)
  [[ ! $asked =~ ^[0-9]+$ ]] || wait=$asked
  [[ $wait -le $longest_wait ]] || fail "the server asks to wait $wait seconds: try again later"
  sleep "$wait"
}

# Fetch URL $1 into file $2, with retries; messages call it $3.
transfer() {
  local number status code reason
  for ((number = 1; number <= tries; number++)); do
    code=0
    status=$(attempt "$1" "$2") || code=$?
    [[ $code -ne 0 ]] || return 0
    consider "$code" "$status" "$1" "$2" "$3" || return 0
    reason=$(tail -n 1 "$scratch/stderr")
    say "  $3: attempt $number of $tries ended at $(size_of "$2") bytes (HTTP $status${reason:+; $reason})"
    [[ $number -eq $tries ]] || pause "$number"
  done
  fail "$3: $tries attempts failed; what has arrived is kept in $2 ($1)"
}

verify() { # part file, name, sha256 of the manifest
  local wanted=$3 whose="of hw3_download.tsv" found
  found=$(sha256_of "$1")
  if [[ $wanted == - ]]; then
    wanted=$(header x-linked-etag)
    whose="given by the hub"
    if [[ ! $wanted =~ ^[0-9a-f]{64}$ ]]; then
      say "  $2: no checksum on record, not verified; its sha256 is $found"
      return
    fi
    say "  $2: no checksum on record; verified against the hub's"
  fi
  [[ $found == "$wanted" ]] && return
  rm -f "$1"
  fail "$2: wrong checksum, $found instead of $wanted $whose; removed, because it is damaged or another version"
}

fetch() { # path source revision bytes sha256
  local target=$root/$1 url
  if [[ -f $target ]]; then
    have=$((have + 1))
    return
  fi
  url=$(url_of "$2" "$3")
  say "$1 ($(readable "${4#\~}")) from $url"
  [[ $3 != main ]] || say "  $1: no revision on record; this is the current one of the hub's branch main"
  mkdir -p "$(dirname "$target")"
  transfer "$url" "$target.part" "$1"
  verify "$target.part" "$1" "$5"
  [[ $5 != - ]] || remember "$1" "$(sha256_of "$target.part")"
  mv "$target.part" "$target"
  got=$((got + 1))
}

remember() { # path sha256
  mkdir -p "$(dirname "$record")"
  { [[ ! -f $record ]] || awk -v path="$1" 'substr($0, 67) != path' "$record"; } >"$scratch/record"
  printf '%s  %s\n' "$2" "$1" >>"$scratch/record"
  cp "$scratch/record" "$record.part" && mv "$record.part" "$record"
}

# --- a part: all of its files ---------------------------------------------------------------------------------------

bytes_to_fetch() {
  local sum=0 path source revision bytes sha256 there
  while IFS=$'\t' read -r path source revision bytes sha256; do
    [[ -f $root/$path ]] || sum=$((sum + ${bytes#\~} - $(size_of "$root/$path.part")))
  done < <(wanted_rows "$1")
  if wants_images "$1"; then
    there=$({ find "$root/hw3_data" -name '*.jpg' 2>/dev/null || true; } | wc -l)
    sum=$((sum + (images - there) * image_bytes))
  fi
  echo $((sum > 0 ? sum : 0))
}

wants_data() { [[ $1 == all || $1 == data ]]; }
wants_images() { wants_data "$1" && ! has_data && [[ -z ${HW3_DATA_ID:-} ]]; }
has_data() { [[ -f $root/hw3_data/p2_data/train.json && -f $root/hw3_data/p2_data/val.json ]]; }

# Without COCO's annotations where the data is already there, or comes from the course.
wanted_rows() {
  if wants_images "$1"; then rows "$1"; else rows "$1" | awk -F '\t' '$2 !~ /^coco:/'; fi
}

check_disk() {
  local needed free
  mkdir -p "$root"
  needed=$(bytes_to_fetch "$1")
  free=$(($(df -Pk "$root" | awk 'NR == 2 { print $4 }') * 1024))
  say "$1: $(readable "$needed") to download into $root, where $(readable "$free") are free"
  ! wants_data "$1" || [[ -z ${HW3_DATA_ID:-} ]] || say "  and the course's hw3_data.zip, of unknown size"
  [[ $((needed + needed / 20)) -le $free ]] ||
    fail "the disk is too small: $(readable "$needed") and 5% are needed; free some space, or set HW3_ROOT"
}

fetch_part() {
  local path source revision bytes sha256
  wanted_rows "$1" >"$scratch/rows"
  [[ -s $scratch/rows ]] || [[ $1 == data ]] || fail "$manifest: lists nothing for $1"
  while IFS=$'\t' read -r path source revision bytes sha256 <&3; do
    fetch "$path" "$source" "$revision" "$bytes" "$sha256"
  done 3<"$scratch/rows"
}

prepare() { PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m captioning.data.hw3_dataset "$@"; }

need_python() { # called before gigabytes are downloaded
  "$PYTHON" -c 'import importlib.util as u, sys
sys.exit(", ".join(n for n in ("PIL", "numpy") if not u.find_spec(n)) or None)' ||
    fail "PYTHON=$PYTHON lacks packages that prepare the data; run: pip install -r requirements.txt"
}

fetch_data() {
  if has_data; then
    say "hw3_data/: the data is already there (from: $(cat "$root/hw3_data/SOURCE.txt" 2>/dev/null || echo your own))"
    [[ -z ${HW3_DATA_ID:-} ]] || grep -qF "$HW3_DATA_ID" "$root/hw3_data/SOURCE.txt" 2>/dev/null ||
      fail "hw3_data/ does not come from HW3_DATA_ID $HW3_DATA_ID: move hw3_data/p2_data and p3_data away first"
  elif [[ -n ${HW3_DATA_ID:-} ]]; then
    course_data
  else
    stand_in
  fi
}

course_data() {
  local zip=$root/hw3_data/.download/hw3_data.zip
  mkdir -p "$(dirname "$zip")"
  if [[ ! -f $zip ]]; then
    say "hw3_data.zip from Google Drive, id $HW3_DATA_ID; no checksum on record, but each member has its own (CRC)"
    "$PYTHON" -m gdown --continue --retries "$tries" --output "$zip.part" "$HW3_DATA_ID" ||
      fail "hw3_data.zip: gdown could not fetch the id $HW3_DATA_ID; is it shared with everyone, and gdown installed (pip install -e '.[download]')?"
    mv "$zip.part" "$zip"
  fi
  if ! prepare unpack --zip "$zip" --out "$root/hw3_data" --source "course zip, Google Drive id $HW3_DATA_ID"; then
    rm -f "$zip"
    fail "hw3_data.zip: not the course's data, or damaged; removed"
  fi
  rm -f "$zip"
  got=$((got + 1))
}

stand_in() {
  local work=$root/hw3_data/.download round left
  say "HW3_DATA_ID is not set: making a stand-in from COCO 2017. It is not the course's data, so scores differ."
  local list=(--out "$root/hw3_data" --base-url "$coco" --config "$scratch/images.curl")
  left=$(prepare draw "${list[@]}" --annotations "$work/annotations_trainval2017.zip" \
    --train "$train_images" --val "$val_images") || fail "hw3_data/: the captions could not be drawn"
  for ((round = 1; left > 0 && round <= tries; round++)); do
    say "hw3_data/: $left images to download"
    if [[ $round -eq 1 ]]; then first_image; else pause "$round"; fi
    fetch_images
    left=$(prepare images "${list[@]}") || fail "hw3_data/: the images that arrived could not be checked"
  done
  got=$((got + images))
  [[ $left -eq 0 ]] ||
    fail "hw3_data/: $left images did not arrive: $(tail -n 1 "$scratch/stderr"), $(sed 1q "$scratch/images.curl")"
}

# One image first, with full messages, before thousands fail for the same reason.
first_image() {
  local url output
  url=$(sed -n 's/^url = "\(.*\)"$/\1/p;1q' "$scratch/images.curl")
  output=$(sed -n '2s/^output = "\(.*\)"$/\1/p' "$scratch/images.curl" | sed 's/\\\(.\)/\1/g')
  transfer "$url" "$output" "${url##*/}"
}

fetch_images() {
  curl --fail --location --silent --show-error --parallel --parallel-max 16 --connect-timeout 30 \
    --speed-limit 1 --speed-time "$stall" --retry 3 --retry-delay "$backoff" --config "$scratch/images.curl" \
    >/dev/null 2>"$scratch/stderr" || say "  some images failed and will be requested again"
}

# --- check ----------------------------------------------------------------------------------------------------------

# COCO's annotations are not needed once the data is made, so they are not checked.
check_part() {
  local path source revision bytes sha256 wrong=0
  while IFS=$'\t' read -r path source revision bytes sha256; do
    [[ $source == coco:* ]] || check_file "$path" "$sha256" || wrong=$((wrong + 1))
  done < <(rows "$1")
  if wants_data "$1"; then
    need_python
    prepare check --out "$root/hw3_data" || wrong=$((wrong + 1))
  fi
  [[ $wrong -eq 0 ]] || fail "$wrong of the above are missing or damaged (move damaged files away first)"
  say "check $1: everything is there"
}

check_file() { # path sha256
  local wanted=$2 whose="" found
  if [[ ! -f $root/$1 ]]; then
    say "MISSING  $1"
    return 1
  fi
  if [[ $wanted == - && -f $record ]]; then
    wanted=$(awk -v path="$1" 'substr($0, 67) == path { print $1 }' "$record")
    whose=" (unchanged since its download; no checksum on record)"
  fi
  if [[ -z $wanted || $wanted == - ]]; then
    say "UNKNOWN  $1: it is there, but no checksum is on record"
    return
  fi
  found=$(sha256_of "$root/$1")
  if [[ $found != "$wanted" ]]; then
    say "DAMAGED  $1: sha256 $found instead of $wanted$whose"
    return 1
  fi
  say "ok       $1$whose"
}

# --- main -----------------------------------------------------------------------------------------------------------

summarise() {
  say
  if [[ $got -eq 0 ]]; then
    say "Nothing to download for $1: everything is there ($have files)."
    say "To verify them: bash hw3_download.sh check $1"
  else
    say "Downloaded $got files; $have were already there."
  fi
  say "They are in:"
  rows "$1" | awk -F '\t' '$2 !~ /^coco:/ { print $1 }' | sed "s|^\(weights/.*/\).*|\1|" | uniq | while read -r path; do
    say "  $root/$path"
  done
  ! wants_data "$1" || say "  $root/hw3_data/p2_data/{train,val}.json and images/, $root/hw3_data/p3_data/images/"
}

usage() {
  sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

main() {
  local action=${1:-all} part=${1:-all}
  have=0 got=0
  [[ $# -le 2 ]] || usage
  [[ -f $manifest ]] || fail "$manifest: no such file; take it from the repository"
  if [[ $action == check ]]; then part=${2:-all}; elif [[ $# -gt 1 ]]; then usage; fi
  again="bash hw3_download.sh $part"
  case $part in all | p1 | p2 | data | best-336 | best-h | best-g) ;; *) usage ;; esac
  if [[ $action == check ]]; then
    check_part "$part"
    return
  fi
  command -v curl >/dev/null || fail "curl is not installed"
  ! wants_data "$action" || need_python
  check_disk "$action"
  fetch_part "$action"
  ! wants_data "$action" || fetch_data
  summarise "$action"
}

main "$@"
