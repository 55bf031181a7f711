// Checks a log's public files with Go's own implementation of notes and trees, knowing nothing of Trailmark.
//
// Usage: tlog_check FOLDER; reads verifier keys, checkpoints, entries, and proofs as one hash in base64 a line.
package main

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

var folder = os.Args[1]

func must(err error, what string) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", what, err)
		os.Exit(1)
	}
}

func read(name string) string {
	data, err := os.ReadFile(filepath.Join(folder, name))
	must(err, name)
	return string(data)
}

// open verifies a checkpoint's signature and returns its size and root.
func open(name string, verifier note.Verifier) (int64, tlog.Hash) {
	opened, err := note.Open([]byte(read(name)), note.VerifierList(verifier))
	must(err, name)
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 || lines[0] != verifier.Name() {
		must(fmt.Errorf("text %q", opened.Text), name)
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	must(err, name)
	root, err := tlog.ParseHash(lines[2])
	must(err, name)
	return size, root
}

func hashes(text string) []tlog.Hash {
	var found []tlog.Hash
	for _, line := range strings.Fields(text) {
		hash, err := tlog.ParseHash(line)
		must(err, "hash")
		found = append(found, hash)
	}
	return found
}

// tileReader serves tiles from the folder, as sumdb lays out the height-8 tiles of c2sp.org/tlog-tiles but for the height.
type tileReader struct{}

func (tileReader) Height() int { return 8 }

func (tileReader) SaveTiles([]tlog.Tile, [][]byte) {}

func (tileReader) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	var data [][]byte
	for _, tile := range tiles {
		path := strings.Replace(tile.Path(), "tile/8/", "tile/", 1)
		one, err := os.ReadFile(filepath.Join(folder, "tiles", path))
		if err != nil {
			return nil, err
		}
		data = append(data, one)
	}
	return data, nil
}

func main() {
	verifier, err := note.NewVerifier(strings.TrimSpace(read("log.vkey")))
	must(err, "log.vkey")
	size, root := open("checkpoint", verifier)
	oldSize, oldRoot := open("old.checkpoint", verifier)
	must(tlog.CheckTree(hashes(read("consistency")), size, root, oldSize, oldRoot), "consistency")
	reader := tlog.TileHashReader(tlog.Tree{N: size, Hash: root}, tileReader{})
	for index := int64(0); index < size; index++ {
		entry, err := base64.StdEncoding.DecodeString(read(fmt.Sprintf("entry.%d", index)))
		must(err, "entry")
		proof := strings.SplitN(read(fmt.Sprintf("proof.%d", index)), "\n\n", 2)
		head := strings.SplitN(proof[0], "\n", 3)
		if head[0] != "c2sp.org/tlog-proof@v1" || head[1] != fmt.Sprintf("index %d", index) {
			must(fmt.Errorf("%q", head), "proof")
		}
		path := ""
		if len(head) == 3 {
			path = head[2]
		}
		leaf := tlog.RecordHash(entry)
		must(tlog.CheckRecord(hashes(path), size, root, index, leaf), fmt.Sprintf("inclusion of %d", index))
		fromTiles, err := tlog.ProveRecord(size, index, reader)
		must(err, "tiles")
		must(tlog.CheckRecord(fromTiles, size, root, index, leaf), fmt.Sprintf("inclusion of %d by tiles", index))
	}
	fromTiles, err := tlog.ProveTree(size, oldSize, reader)
	must(err, "tiles")
	must(tlog.CheckTree(fromTiles, size, root, oldSize, oldRoot), "consistency by tiles")
	fmt.Printf("%d entries of %s hold\n", size, verifier.Name())
}
