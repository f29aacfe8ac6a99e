# Read by the programs here, which stand in for those of a guest: they write down how they were called, and do to
# files what the real ones would do.

# One call on a line, its words separated by tabs.
record() {
    line=${0##*/}
    for word; do line="$line	$word"; done
    printf '%s\n' "$line" >>/var/log/recorded
}

# The modules named in $2 of kernel $1, and all that they depend on; "*" means every one.
modules() {
    awk -v wanted="$2" '
        BEGIN {
            count = split(wanted, words, " ")
            for (i = 1; i <= count; i++) { gsub(/-/, "_", words[i]); want[words[i]] }
        }
        {
            sub(/:$/, "", $1)
            name = $1; sub(/.*\//, "", name); sub(/\.ko.*/, "", name); gsub(/-/, "_", name)
            if (wanted == "*" || name in want) for (i = 1; i <= NF; i++) print $i
        }' "/lib/modules/$1/modules.dep" | sort -u
}

# An archive of directory $1 as image $2, beside the old one until it is complete.
pack() {
    (cd "$1" && find . | cpio -o -H newc 2>/dev/null | gzip) >"$2.new" && mv "$2.new" "$2" && rm -r "$1"
}

# A directory with the files that every image of this guest has.
contents() {
    root=$(mktemp -d /var/tmp/image.XXXXXX)
    while read -r file; do
        mkdir -p "$(dirname "$root/$file")"
        : >"$root/$file"
    done </usr/share/phony/contents
    echo "$root"
}

fail() {
    echo "${0##*/}: $*" >&2
    exit 1
}
