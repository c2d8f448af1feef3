// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

const testSecret = "hunter2-tOp+s3cret"

func TestSecretNeverPrints(t *testing.T) {
	s := NewSecret(testSecret)
	spec := Spec{Scheme: SchemeSOCKS5, Host: "h", Port: 1, HasUser: true, HasPassword: true, Password: s, Token: s}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%T %v", "%10.3s", "%p", "%c"} {
		args := []any{s}
		if strings.HasPrefix(verb, "%T") {
			args = append([]any{s}, s)
		}
		for _, got := range []string{
			fmt.Sprintf(verb, args...), fmt.Sprintf("%v", []any{s, &s}), fmt.Sprintf("%+v", spec), fmt.Sprintf("%#v", struct{ S Secret }{s}), fmt.Sprintf("%+v %#[1]v", struct{ s Secret }{s}),
		} {
			if strings.Contains(got, testSecret) || strings.Contains(got, "68756e") || strings.Contains(got, "104 117") {
				t.Errorf("%s: %q", verb, got)
			}
		}
	}
	j, err := json.Marshal(map[string]any{"s": s, "spec": spec, "p": &s})
	if err != nil || strings.Contains(string(j), testSecret) || !strings.Contains(string(j), `"s":"***"`) {
		t.Errorf("json: %s %v", j, err)
	}
	core, logs := observer.New(zap.DebugLevel)
	zap.New(core).Info("x", zap.Any("s", s), zap.Any("spec", spec), zap.Stringer("st", s), zap.Reflect("r", spec))
	if got := fmt.Sprint(logs.All()); strings.Contains(got, testSecret) {
		t.Errorf("zap: %s", got)
	}
}

func TestSecret(t *testing.T) {
	s := NewSecret(testSecret)
	c := s
	if !s.Equal(c) || s.Equal(NewSecret("x")) || s.Reveal() != testSecret || s.IsZero() || !NewSecret("").IsZero() {
		t.Error("wrong value")
	}
	s.Wipe()
	if c.Reveal() == testSecret {
		t.Error("a copy survived Wipe")
	}
}

func TestReadSecrets(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pass")
	for content, want := range map[string]string{"pw\n": "pw", "pw\r\n": "pw", "pw": "pw", " p w \n\n": " p w \n", "": ""} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := ParseURL("socks5://u@h?password_file=" + path)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.ReadSecrets(); err != nil || s.Password.Reveal() != want || !s.HasPassword {
			t.Errorf("%q: %q, %v", content, s.Password.Reveal(), err)
		}
	}
	s, _ := ParseURL("socks5://u@h?password_file=" + path + ".none")
	if err := s.ReadSecrets(); err == nil || !strings.Contains(err.Error(), "password_file") {
		t.Errorf("missing file: %v", err)
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("x", maxSecretFile+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ = ParseURL("https://h?auth=bearer&token_file=" + path)
	if err := s.ReadSecrets(); err == nil {
		t.Error("a huge file was taken for a secret")
	}
}
