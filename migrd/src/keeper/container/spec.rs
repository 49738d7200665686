//! The OCI runtime specification of a container (config.json), as far as moving it
//! depends on it. The rest is runc's to judge, and is handed on as it is.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// The longest specification that is taken (bytes): it travels in an offer.
pub const MAX_SPEC: usize = 512 << 10;
/// Kinds of namespaces a container must have for itself.
const OWN: [(&str, &str); 2] = [
    ("pid", "CRIU makes its processes with the numbers they had"),
    ("mount", "its root file system is its own"),
];
/// Kinds that it can't have yet.
const NOT_CARRIED: [&str; 2] = ["user", "time"];

/// What is wrong with a specification, and what to do.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not JSON.
    #[error("config.json is not a JSON object ({0}): make one with `runc spec`")]
    NotJson(String),
    /// Too long to be sent.
    #[error("config.json has {0} bytes: at most {MAX_SPEC} are taken")]
    TooLong(usize),
    /// Something that every container has is missing, or is of another type.
    #[error("config.json has no usable {0}: make one with `runc spec`, and change that")]
    Lacks(&'static str),
    /// A terminal.
    #[error(
        "config.json has \"terminal\": true, and containers have no terminals here: set \
         process.terminal to false; their output is in `migctl logs`"
    )]
    Terminal,
    /// It shares what can't be shared.
    #[error(
        "config.json gives the container no {0} namespace of its own, and {1}: add \
         {{\"type\": \"{0}\"}} to linux.namespaces"
    )]
    Shares(&'static str, &'static str),
    /// It joins a namespace that is somebody else's.
    #[error(
        "config.json has the container join the {0} namespace {1:?}, which does not move with it: \
         leave the path out, so that it gets one of its own"
    )]
    Joins(String, String),
    /// A namespace that is not carried.
    #[error(
        "config.json gives the container a {0} namespace, which can't be moved yet: leave it out"
    )]
    NotCarried(&'static str),
    /// Somebody outside answers its system calls.
    #[error(
        "config.json has seccomp ask a process outside of the container (listenerPath), which \
         does not move with it: leave that out"
    )]
    SeccompListener,
}

/// Where a container has its network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// It is the host's.
    Host,
    /// A namespace of its own, that nothing leads into.
    Own,
    /// The namespace of that path, on every host.
    At(PathBuf),
}

/// A specification, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    whole: Map<String, Value>,
    rootfs: PathBuf,
}

impl Spec {
    /// One whose paths are absolute: it was made by [`Spec::of_bundle`], here or on
    /// another host.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, SpecError> {
        Self::read(Path::new("/"), bytes)
    }

    /// That of a bundle, with its paths made absolute.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of_bundle(bundle: &Path, bytes: &[u8]) -> Result<Self, SpecError> {
        Self::read(bundle, bytes)
    }

    fn read(bundle: &Path, bytes: &[u8]) -> Result<Self, SpecError> {
        if bytes.len() > MAX_SPEC {
            return Err(SpecError::TooLong(bytes.len()));
        }
        let whole = serde_json::from_slice::<Map<String, Value>>(bytes);
        let mut whole = whole.map_err(|e| SpecError::NotJson(e.to_string()))?;
        if !whole.get("ociVersion").is_some_and(Value::is_string) {
            return Err(SpecError::Lacks("ociVersion"));
        }
        let root = whole.get_mut("root").and_then(|root| root.get_mut("path"));
        let rootfs = absolute(bundle, root).ok_or(SpecError::Lacks("root.path"))?;
        for mount in list_mut(&mut whole, "mounts") {
            if is_bind(mount) {
                absolute(bundle, mount.get_mut("source")).ok_or(SpecError::Lacks("mounts"))?;
            }
        }
        let spec = Self { whole, rootfs };
        spec.check_process()?;
        spec.check_namespaces()?;
        if spec.at("/linux/seccomp/listenerPath").and_then(Value::as_str).is_some() {
            return Err(SpecError::SeccompListener);
        }
        Ok(spec)
    }

    fn check_process(&self) -> Result<(), SpecError> {
        if self.at("/process/terminal").and_then(Value::as_bool).unwrap_or(false) {
            return Err(SpecError::Terminal);
        }
        if self.argv().is_empty() {
            return Err(SpecError::Lacks("process.args"));
        }
        if !self.cwd().starts_with('/') {
            return Err(SpecError::Lacks("process.cwd"));
        }
        Ok(())
    }

    fn check_namespaces(&self) -> Result<(), SpecError> {
        for (kind, why) in OWN {
            if !self.namespaces().any(|(found, _)| found == kind) {
                return Err(SpecError::Shares(kind, why));
            }
        }
        for kind in NOT_CARRIED {
            if self.namespaces().any(|(found, _)| found == kind) {
                return Err(SpecError::NotCarried(kind));
            }
        }
        match self.namespaces().find(|(kind, path)| *kind != "network" && path.is_some()) {
            Some((kind, path)) => {
                Err(SpecError::Joins(kind.to_owned(), path.unwrap_or_default().to_owned()))
            }
            None => Ok(()),
        }
    }

    fn at(&self, pointer: &str) -> Option<&Value> {
        let (first, rest) =
            pointer.strip_prefix('/')?.split_once('/').unwrap_or((&pointer[1..], ""));
        let value = self.whole.get(first)?;
        if rest.is_empty() { Some(value) } else { value.pointer(&format!("/{rest}")) }
    }

    fn list(&self, pointer: &str) -> impl Iterator<Item = &Value> {
        self.at(pointer).and_then(Value::as_array).into_iter().flatten()
    }

    fn strings(&self, pointer: &str) -> Vec<String> {
        self.list(pointer).filter_map(Value::as_str).map(ToOwned::to_owned).collect()
    }

    fn namespaces(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.list("/linux/namespaces").filter_map(|namespace| {
            let path = namespace.get("path").and_then(Value::as_str);
            Some((namespace.get("type")?.as_str()?, path.filter(|path| !path.is_empty())))
        })
    }

    /// Its root file system.
    #[must_use]
    pub fn rootfs(&self) -> &Path {
        &self.rootfs
    }

    /// Whether it can't write to that.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.at("/root/readonly").and_then(Value::as_bool).unwrap_or(false)
    }

    /// What it runs.
    #[must_use]
    pub fn argv(&self) -> Vec<String> {
        self.strings("/process/args")
    }

    /// Where that starts, in its root.
    #[must_use]
    pub fn cwd(&self) -> String {
        self.at("/process/cwd").and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// What of the host it sees: path inside, path on the host.
    #[must_use]
    pub fn binds(&self) -> Vec<(PathBuf, PathBuf)> {
        let binds = self.list("/mounts").filter(|mount| is_bind(mount));
        let pair = |mount: &Value| {
            let path = |name| mount.get(name).and_then(Value::as_str).map(PathBuf::from);
            Some((path("destination")?, path("source")?))
        };
        binds.filter_map(pair).collect()
    }

    /// What is hidden from it: files by `/dev/null`, directories by an empty one.
    #[must_use]
    pub fn masked(&self) -> Vec<String> {
        self.strings("/linux/maskedPaths")
    }

    /// Where its devices are, in its root.
    #[must_use]
    pub fn devices(&self) -> Vec<PathBuf> {
        let paths = self.list("/linux/devices").filter_map(|device| device.get("path")?.as_str());
        paths.map(PathBuf::from).collect()
    }

    /// The numbers of its devices: whether it is a block device, major, minor.
    #[must_use]
    pub fn device_numbers(&self) -> Vec<(bool, u32, u32)> {
        let of = |device: &Value| {
            let number = |name| u32::try_from(device.get(name)?.as_u64()?).ok();
            let block = match device.get("type")?.as_str()? {
                "b" => true,
                "c" | "u" => false,
                _ => return None,
            };
            Some((block, number("major")?, number("minor")?))
        };
        self.list("/linux/devices").filter_map(of).collect()
    }

    /// The programs that runc runs for it on the host.
    #[must_use]
    pub fn hooks(&self) -> Vec<PathBuf> {
        let hooks = self.at("/hooks").and_then(Value::as_object);
        let lists = hooks.into_iter().flat_map(Map::values).filter_map(Value::as_array);
        let paths = lists.flatten().filter_map(|hook| hook.get("path")?.as_str());
        paths.map(PathBuf::from).collect()
    }

    /// Where it has its network.
    #[must_use]
    pub fn network(&self) -> Network {
        match self.namespaces().find(|(kind, _)| *kind == "network") {
            None => Network::Host,
            Some((_, None)) => Network::Own,
            Some((_, Some(path))) => Network::At(path.into()),
        }
    }

    /// Whether its cgroup is the root of what it sees of cgroups.
    #[must_use]
    pub fn has_cgroup_namespace(&self) -> bool {
        self.namespaces().any(|(kind, _)| kind == "cgroup")
    }

    /// For a message to another host.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        // A map with strings as keys is always JSON.
        serde_json::to_vec(&self.whole).unwrap_or_default()
    }

    /// The same with a root file system elsewhere, for a message.
    #[must_use]
    pub fn with_rootfs(&self, path: &Path) -> Vec<u8> {
        let mut whole = self.whole.clone();
        if let Some(root) = whole.get_mut("root").and_then(Value::as_object_mut) {
            root.insert("path".into(), json!(path.display().to_string()));
        }
        serde_json::to_vec(&whole).unwrap_or_default()
    }

    /// The same on this host: in that cgroup, and in the network namespace of that
    /// path if it is to be in another than it says. What is mounted into it is named without
    /// symbolic links, which CRIU does not follow where runc does.
    #[must_use]
    pub fn on_host(&self, cgroup: &str, network: Option<&str>) -> Vec<u8> {
        let mut whole = self.whole.clone();
        for mount in list_mut(&mut whole, "mounts").filter(|mount| is_bind(mount)) {
            let Some(source) = mount.get_mut("source") else { continue };
            // What is not there is runc's to name.
            let real = source.as_str().and_then(|source| std::fs::canonicalize(source).ok());
            if let Some(real) = real.as_deref().and_then(Path::to_str) {
                *source = Value::from(real);
            }
        }
        if let Some(linux) = whole.get_mut("linux").and_then(Value::as_object_mut) {
            linux.insert("cgroupsPath".into(), json!(format!("/{cgroup}")));
            if let (Some(path), Some(Value::Array(namespaces))) =
                (network, linux.get_mut("namespaces"))
            {
                namespaces.retain(|namespace| namespace["type"] != "network");
                namespaces.push(json!({"type": "network", "path": path}));
            }
        }
        serde_json::to_vec(&whole).unwrap_or_default()
    }
}

fn list_mut<'a>(
    whole: &'a mut Map<String, Value>,
    name: &str,
) -> impl Iterator<Item = &'a mut Value> {
    whole.get_mut(name).and_then(Value::as_array_mut).into_iter().flatten()
}

fn is_bind(mount: &Value) -> bool {
    let options = mount.get("options").and_then(Value::as_array);
    let says = |option: &Value| matches!(option.as_str(), Some("bind" | "rbind"));
    mount.get("type").and_then(Value::as_str) == Some("bind")
        || options.is_some_and(|options| options.iter().any(says))
}

/// Makes a path absolute where it stands.
fn absolute(bundle: &Path, value: Option<&mut Value>) -> Option<PathBuf> {
    let value = value?;
    let path = value.as_str().filter(|path| !path.is_empty())?;
    let path = bundle.join(path);
    *value = Value::from(path.to_str()?);
    Some(path)
}

#[cfg(test)]
mod tests;
