//! Root file systems that travel: one with everything that files can have, and a
//! picture of what is there.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::PYTHON;
use super::container::{Bundle, NAME, PORT, inspect, spec};
use crate::daemon::Daemon;
use crate::migctl::Ran;

/// Prints a line for everything below a directory: all that a copy has to have.
const PICTURE: &str = "\
import hashlib, os, stat, sys
root = sys.argv[1]
def line(path):
    s = os.lstat(path)
    facts = [os.path.relpath(path, root), oct(s.st_mode), s.st_uid, s.st_gid, s.st_mtime_ns]
    facts += [(n, os.getxattr(path, n, follow_symlinks=False).hex())
              for n in sorted(os.listxattr(path, follow_symlinks=False))]
    if stat.S_ISLNK(s.st_mode): facts.append(os.readlink(path))
    if stat.S_ISREG(s.st_mode):
        facts += [s.st_nlink, s.st_size, hashlib.sha256(open(path, 'rb').read()).hexdigest(),
                  s.st_size > 1 << 20 and s.st_blocks * 512 < s.st_size // 2]
    if stat.S_ISCHR(s.st_mode) or stat.S_ISBLK(s.st_mode): facts.append(hex(s.st_rdev))
    print(*map(repr, facts))
line(root)
for at, directories, files in sorted(os.walk(root)):
    for name in sorted(directories + files): line(os.path.join(at, name))
names = {}
for at, directories, files in sorted(os.walk(root)):
    for name in sorted(files):
        s = os.lstat(os.path.join(at, name))
        if s.st_nlink > 1: names.setdefault(s.st_ino, []).append(os.path.relpath(os.path.join(at, name), root))
print(sorted(names.values()))
";

/// Puts one of everything below a directory.
const SAMPLE: &str = "\
import os, socket, struct, sys
os.umask(0)
os.chdir(sys.argv[1])
os.makedirs('etc/secret', 0o700); os.mkdir('var/spool', 0o1777)
open('etc/names', 'w').write('names')
os.link('etc/names', 'etc/same'); os.link('etc/names', 'var/same')
os.symlink('/bin/busybox', 'etc/link'); os.symlink('../../nowhere', 'etc/dangling')
open('etc/owned', 'w').write('x' * 5000); os.chmod('etc/owned', 0o4751); os.chown('etc/owned', 1000, 1001)
open('etc/capable', 'w').write('program'); os.chmod('etc/capable', 0o755)
os.setxattr('etc/capable', 'security.capability', struct.pack('<IIIII', 0x02000001, 1 << 10, 0, 0, 0))
os.setxattr('etc/names', 'user.note', b'a note'); os.setxattr('etc/secret', 'trusted.note', b'of root')
with open('var/sparse', 'wb') as f:
    f.truncate(48 << 20); f.seek(20 << 20); f.write(b'middle'); f.seek((48 << 20) - 3); f.write(b'end')
open('etc/empty', 'w'); open('etc/unreadable', 'w').write('x'); os.chmod('etc/unreadable', 0)
os.mkfifo('var/pipe', 0o622); os.mknod('etc/null', 0o020666, os.makedev(1, 3))
s = socket.socket(socket.AF_UNIX); s.bind('var/socket'); s.close()
open(b'var/odd \\n\\xff', 'w').write('odd')
for path in ['etc/owned', 'etc/names', 'var/sparse', 'etc/secret', 'etc/link']:
    os.utime(path, ns=(1, 981173106123456789), follow_symlinks=False)
";

/// A line for everything below a directory, and the names that files share.
///
/// # Errors
/// When something of it can't be read.
pub fn picture(root: &Path) -> Result<Vec<String>> {
    let ran = Command::new(PYTHON).arg("-c").arg(PICTURE).arg(root).output()?;
    let said = String::from_utf8_lossy(&ran.stderr);
    ensure!(ran.status.success(), "{}: {said}", root.display());
    Ok(String::from_utf8_lossy(&ran.stdout).lines().map(str::to_owned).collect())
}

/// Fails unless there is the same below both.
///
/// # Errors
/// Naming what differs.
pub fn expect_same(one: &[String], other: &[String]) -> Result<()> {
    for line in one {
        ensure!(other.contains(line), "only in the first: {line}");
    }
    for line in other {
        ensure!(one.contains(line), "only in the second: {line}");
    }
    Ok(())
}

/// Puts one of everything that files can be into a bundle's root file system.
///
/// # Errors
/// When this is not root, or the file system lacks something.
pub fn add_samples(bundle: &Bundle) -> Result<()> {
    run_python(SAMPLE, &bundle.rootfs())
}

/// Runs a Python program with a directory as its argument.
///
/// # Errors
/// When it fails, with what it said.
pub fn run_python(program: &str, directory: &Path) -> Result<()> {
    let ran = Command::new(PYTHON).arg("-c").arg(program).arg(directory).output()?;
    ensure!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    Ok(())
}

/// What a container is made of that counts, writes each number into its root, and
/// serves; nothing of it is anywhere but there.
///
/// # Errors
/// When it can't be made.
pub fn writing_spec() -> Result<Value> {
    let program = format!(
        "nc -ll -p {PORT} -e /bin/cat & i=0; while :; do i=$((i+1)); echo $i >> /var/log/count; \
         echo count $i; sleep 0.05; done"
    );
    let mut spec = spec(&program);
    spec["root"]["readonly"] = json!(false);
    let mounts = spec["mounts"].as_array_mut().context("no mounts")?;
    mounts.retain(|mount| mount["destination"] != "/data");
    Ok(spec)
}

/// Starts it, so that its root file system moves with it.
///
/// # Errors
/// When it does not come up.
pub fn run(bundle: &Bundle, host: &Daemon, options: &[&str]) -> Result<()> {
    bundle.write(&writing_spec()?)?;
    bundle.run(host, &[&["--rootfs", "copy"], options].concat())
}

/// Has a daemon not see a bundle, as on another host: before it starts.
pub fn hide(bundle: &Bundle, from: &mut Daemon) {
    from.before(&format!("mount -t tmpfs none {}", bundle.path.display()));
}

/// Where the host has the container's root file system.
///
/// # Errors
/// When it is not there.
pub fn rootfs_at(host: &Daemon) -> Result<PathBuf> {
    let said = inspect(host)?;
    let path = said["process"]["container"]["rootfs"].as_str().map(PathBuf::from);
    path.with_context(|| said.to_string())
}

/// The numbers that the container has written into its root, which must be all, in
/// order; the last.
///
/// # Errors
/// Saying what is missing.
pub fn written(root: &Path) -> Result<u64> {
    let text = fs::read_to_string(root.join("var/log/count"))?;
    let mut last = 0;
    // A line may still be arriving.
    for line in text[..text.rfind('\n').map_or(0, |end| end + 1)].lines() {
        ensure!(line.parse::<u64>()? == last + 1, "{line:?} follows {last}");
        last += 1;
    }
    Ok(last)
}

/// What a migration there would meet.
///
/// # Errors
/// When `migctl` can't be run.
pub fn plan(from: &Daemon, to: &Daemon) -> Result<Ran> {
    super::moved(from, to, NAME, &["--dry-run"])
}

/// What of root file systems a daemon has, as it sees that.
///
/// # Errors
/// When it does not run.
pub fn kept_by(host: &Daemon) -> Result<Vec<String>> {
    let state = host.state_dir().strip_prefix("/")?;
    let place = Path::new("/proc").join(host.pid()?.to_string()).join("root").join(state);
    let entries = fs::read_dir(place.join("rootfs"))?;
    let name = |entry: fs::DirEntry| String::from_utf8_lossy(entry.file_name().as_bytes()).into();
    Ok(entries.flatten().map(name).collect())
}
