//! Seccomp profiles in the format of container runtimes: which calls are allowed, and putting them in force.

use std::collections::BTreeSet;
use std::path::Path;

use seccompiler::{BpfProgram, TargetArch};
use serde_json::{Value, json};

use crate::outcome::Failure;

/// Architectures that the project is built for.
const ARCHITECTURES: [TargetArch; 2] = [TargetArch::x86_64, TargetArch::aarch64];

/// What a profile allows; everything else fails with EPERM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Profile {
    pub(crate) allowed: BTreeSet<String>,
}

impl Profile {
    /// Reads a profile that is a plain list of allowed calls, each of which exists.
    pub(crate) fn read(path: &Path) -> Result<Profile, Failure> {
        let text = std::fs::read_to_string(path)?;
        Profile::parse(&text).map_err(|words| Failure::new(format!("{}: {words}", path.display())))
    }

    fn parse(text: &str) -> Result<Profile, String> {
        let profile: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if profile["defaultAction"] != "SCMP_ACT_ERRNO" || profile["defaultErrnoRet"] != 1 {
            return Err("what is not allowed must fail with EPERM".into());
        }
        let mut allowed = BTreeSet::new();
        for rule in profile["syscalls"].as_array().ok_or("no syscalls")? {
            if rule["action"] != "SCMP_ACT_ALLOW" || rule.get("args").is_some() {
                return Err(format!("a rule that is not a plain permission: {rule}"));
            }
            for name in rule["names"].as_array().ok_or("a rule without names")? {
                let name = name.as_str().ok_or("a name that is no text")?;
                if !ARCHITECTURES.iter().any(|architecture| exists(name, *architecture)) {
                    return Err(format!("no system call {name:?}"));
                }
                allowed.insert(name.to_owned());
            }
        }
        Ok(Profile { allowed })
    }

    /// The same without the calls that begin so.
    pub(crate) fn without(&self, prefix: &str) -> Profile {
        let kept = self.allowed.iter().filter(|name| !name.starts_with(prefix));
        Profile {
            allowed: kept.cloned().collect(),
        }
    }

    /// As container runtimes read it.
    pub(crate) fn to_json(&self) -> String {
        json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "syscalls": [{"names": self.allowed, "action": "SCMP_ACT_ALLOW"}],
        })
        .to_string()
    }

    /// Puts it in force for this thread and what it becomes.
    pub(crate) fn apply(&self) -> Result<(), Failure> {
        let broken = |error: &dyn std::fmt::Display| Failure::new(format!("seccomp filter: {error}"));
        let architecture = std::env::consts::ARCH
            .try_into()
            .map_err(|error: seccompiler::BackendError| broken(&error))?;
        let here = self.allowed.iter().filter(|name| exists(name, architecture));
        let program = compile(here, architecture).map_err(|error| broken(&error))?;
        seccompiler::apply_filter(&program).map_err(|error| broken(&error))
    }
}

fn exists(name: &str, architecture: TargetArch) -> bool {
    compile([&name.to_owned()].into_iter(), architecture).is_ok()
}

fn compile<'a>(
    names: impl Iterator<Item = &'a String>,
    architecture: TargetArch,
) -> Result<BpfProgram, Box<dyn std::error::Error>> {
    let calls: Vec<Value> = names.map(|name| json!({ "syscall": name })).collect();
    let filter = json!({
        "main": {"mismatch_action": {"errno": 1}, "match_action": "allow", "filter": calls},
    });
    let mut programs = seccompiler::compile_from_json(filter.to_string().as_bytes(), architecture)?;
    Ok(programs.remove("main").ok_or("no program")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(names: &str, action: &str) -> Result<Profile, String> {
        Profile::parse(&format!(
            r#"{{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "syscalls": [{{"names": [{names}], "action": "{action}"}}]}}"#
        ))
    }

    #[test]
    fn a_profile_lists_calls_that_exist_somewhere() {
        let read = profile(r#""read", "io_uring_enter", "open""#, "SCMP_ACT_ALLOW").expect("good");
        assert_eq!(read.allowed.len(), 3);
        assert_eq!(read.without("io_uring_").allowed.len(), 2);
        assert_eq!(Profile::parse(&read.to_json()), Ok(read));
        assert!(profile(r#""io_uring_entre""#, "SCMP_ACT_ALLOW").is_err());
        assert!(profile(r#""read""#, "SCMP_ACT_LOG").is_err());
        assert!(Profile::parse(r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}"#).is_err());
    }
}
