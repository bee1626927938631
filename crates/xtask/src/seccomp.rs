//! Seccomp profiles in the format of container runtimes: what they say of each system call, and putting them in force.

use std::collections::BTreeSet;
use std::path::Path;

use seccompiler::{BpfProgram, TargetArch};
use serde_json::{Value, json};

use crate::outcome::Failure;

/// Architectures that the project is built for.
const ARCHITECTURES: [TargetArch; 2] = [TargetArch::x86_64, TargetArch::aarch64];
const EPERM: u64 = 1;

/// What a profile says; calls that it does not name fail with EPERM.
#[derive(Clone, Debug)]
pub(crate) struct Profile {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    names: BTreeSet<String>,
    /// `None`: allowed, under the conditions given.
    errno: Option<u64>,
    /// All must hold; as seccompiler reads them.
    conditions: Vec<Value>,
    /// As it was read.
    source: Value,
}

impl Profile {
    /// Reads a profile, each call of which exists.
    pub(crate) fn read(path: &Path) -> Result<Profile, Failure> {
        let text = std::fs::read_to_string(path)?;
        Profile::parse(&text).map_err(|words| Failure::new(format!("{}: {words}", path.display())))
    }

    fn parse(text: &str) -> Result<Profile, String> {
        let profile: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if profile["defaultAction"] != "SCMP_ACT_ERRNO" || profile["defaultErrnoRet"] != EPERM {
            return Err("what is not allowed must fail with EPERM".into());
        }
        let rules = profile["syscalls"].as_array().ok_or("no syscalls")?;
        Ok(Profile {
            rules: rules.iter().map(Rule::parse).collect::<Result<_, _>>()?,
        })
    }

    /// Whether a call is allowed whatever its arguments.
    pub(crate) fn allows(&self, name: &str) -> bool {
        let allows = |rule: &Rule| rule.errno.is_none() && rule.conditions.is_empty();
        self.rules.iter().any(|rule| allows(rule) && rule.names.contains(name))
    }

    /// The same without the calls that begin so.
    pub(crate) fn without(&self, prefix: &str) -> Profile {
        let mut profile = self.clone();
        for rule in &mut profile.rules {
            rule.names.retain(|name| !name.starts_with(prefix));
        }
        profile.rules.retain(|rule| !rule.names.is_empty());
        profile
    }

    /// As container runtimes read it.
    pub(crate) fn to_json(&self) -> String {
        let rule = |rule: &Rule| {
            let mut source = rule.source.clone();
            source["names"] = json!(rule.names);
            source
        };
        json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": EPERM,
            "syscalls": self.rules.iter().map(rule).collect::<Vec<_>>(),
        })
        .to_string()
    }

    /// Puts it in force for this thread and what it becomes.
    pub(crate) fn apply(&self) -> Result<(), Failure> {
        let broken = |error: &dyn std::fmt::Display| Failure::new(format!("seccomp filter: {error}"));
        let architecture = std::env::consts::ARCH
            .try_into()
            .map_err(|error: seccompiler::BackendError| broken(&error))?;
        // Of several filters the strictest answer counts: what fails otherwise than with EPERM has one of its own, and
        // passes the last.
        let mut filters = Vec::new();
        for rule in &self.rules {
            if let Some(errno) = rule.errno {
                let calls = rule.calls(architecture);
                filters.push(compile(calls, json!("allow"), json!({ "errno": errno }), architecture));
            }
        }
        let calls = self.rules.iter().flat_map(|rule| rule.calls(architecture)).collect();
        filters.push(compile(calls, json!({ "errno": EPERM }), json!("allow"), architecture));
        for filter in filters {
            let filter = filter.map_err(|error| broken(&error))?;
            seccompiler::apply_filter(&filter).map_err(|error| broken(&error))?;
        }
        Ok(())
    }
}

impl Rule {
    fn parse(source: &Value) -> Result<Rule, String> {
        let errno = match source["action"].as_str() {
            Some("SCMP_ACT_ALLOW") => None,
            Some("SCMP_ACT_ERRNO") => Some(source["errnoRet"].as_u64().ok_or("an errno is missing")?),
            _ => return Err(format!("an action that is not understood: {source}")),
        };
        let conditions = source["args"].as_array().map_or(&[][..], Vec::as_slice);
        let conditions: Vec<Value> = conditions.iter().map(condition).collect::<Result<_, _>>()?;
        if errno.is_some() && !conditions.is_empty() {
            return Err(format!("only permissions may have conditions: {source}"));
        }
        let mut names = BTreeSet::new();
        for name in source["names"].as_array().ok_or("a rule without names")? {
            let name = name.as_str().ok_or("a name that is no text")?;
            if !ARCHITECTURES.iter().any(|architecture| exists(name, *architecture)) {
                return Err(format!("no system call {name:?}"));
            }
            names.insert(name.to_owned());
        }
        Ok(Rule {
            names,
            errno,
            conditions,
            source: source.clone(),
        })
    }

    /// Those that this architecture has, as seccompiler reads them.
    fn calls(&self, architecture: TargetArch) -> Vec<Value> {
        let here = self.names.iter().filter(|name| exists(name, architecture));
        here.map(|name| match self.conditions.as_slice() {
            [] => json!({ "syscall": name }),
            conditions => json!({ "syscall": name, "args": conditions }),
        })
        .collect()
    }
}

fn condition(source: &Value) -> Result<Value, String> {
    let number = |field: &str| source[field].as_u64().ok_or(format!("no {field}: {source}"));
    let (index, value) = (number("index")?, number("value")?);
    let (operation, value) = match source["op"].as_str() {
        Some("SCMP_CMP_NE") => (json!("ne"), value),
        Some("SCMP_CMP_MASKED_EQ") => (json!({ "masked_eq": value }), number("valueTwo")?),
        _ => return Err(format!("a condition that is not understood: {source}")),
    };
    Ok(json!({ "index": index, "type": "qword", "op": operation, "val": value }))
}

fn exists(name: &str, architecture: TargetArch) -> bool {
    let call = json!({ "syscall": name });
    compile(vec![call], json!({ "errno": EPERM }), json!("allow"), architecture).is_ok()
}

fn compile(
    calls: Vec<Value>,
    otherwise: Value,
    matched: Value,
    architecture: TargetArch,
) -> Result<BpfProgram, Box<dyn std::error::Error>> {
    let filter = json!({
        "main": {"mismatch_action": otherwise, "match_action": matched, "filter": calls},
    });
    let mut programs = seccompiler::compile_from_json(filter.to_string().as_bytes(), architecture)?;
    Ok(programs.remove("main").ok_or("no program")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(rule: Value) -> Result<Profile, String> {
        let plain = json!({"names": ["read", "io_uring_enter", "open"], "action": "SCMP_ACT_ALLOW"});
        Profile::parse(
            &json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "syscalls": [plain, rule]}).to_string(),
        )
    }

    #[test]
    fn a_profile_says_what_it_allows_and_comes_back_as_it_was() {
        let mask = json!({"index": 0, "value": 0x7e02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"});
        let read =
            profile(json!({"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [mask]})).expect("understood");
        assert!(read.allows("read") && read.allows("io_uring_enter"));
        assert!(!read.allows("clone"), "not whatever its arguments");
        assert!(!read.without("io_uring_").allows("io_uring_enter"));
        let again = Profile::parse(&read.to_json()).expect("its own");
        assert_eq!(again.to_json(), read.to_json());
        profile(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38})).expect("understood");
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for rule in [
            json!({"names": ["io_uring_entre"], "action": "SCMP_ACT_ALLOW"}),
            json!({"names": ["read"], "action": "SCMP_ACT_LOG"}),
            json!({"names": ["read"], "action": "SCMP_ACT_ERRNO"}),
            json!({"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_GT"}]}),
        ] {
            assert!(profile(rule.clone()).is_err(), "{rule}");
        }
        assert!(Profile::parse(r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}"#).is_err());
    }
}
