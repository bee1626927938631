use std::time::Duration;

use super::MemberId;
use super::member::MemberSet;
use crate::SettingsError;

/// The list, the lease and the bounds of a [`super::Cluster`]. Plain data; [`ClusterSettings::check`] once. All members must have the same
/// `members`, `fenced`, `lease_ttl` and `drift_permille`.
#[derive(Clone, Debug)]
pub struct ClusterSettings {
    /// How many members the list has, this one included; at most 64.
    pub members: u32,
    /// This one's place in it.
    pub own: MemberId,
    /// Whether a member serves only while a majority renews its lease. Needs three members: of two, neither could do without the other.
    pub fenced: bool,
    /// How long a renewal lets a member serve, from when it was sent. A purge that cannot reach a member waits that long.
    pub lease_ttl: Duration,
    /// How often a member renews its lease, and learns what others know. Below half of `lease_ttl`, so that one lost message does not end a lease.
    pub renew_every: Duration,
    /// How much faster one member's clock may run than another's, thousandths.
    pub drift_permille: u32,
    /// First wait before an ask or a store is sent again; doubles up to `resend_after_max`.
    pub resend_after: Duration,
    /// Longest wait before it is sent again.
    pub resend_after_max: Duration,
    /// Raises that some member has not confirmed (each costs up to 2 KiB with its name). Full means busy.
    pub operations_max: usize,
    /// Stores of others that are being recorded here. Beside them, one grant of each member is.
    pub records_in_flight_max: usize,
    /// Names with a generation: with more, no new ones are learnt from others (each costs up to 200 bytes and its name). Those of this node's own register are
    /// always taken; the register has a bound of its own, and this one should not be below it.
    pub names_max: usize,
    /// Longest name, bytes.
    pub name_bytes_max: usize,
    /// Names in one message. The largest has this many times the longest name.
    pub entries_per_message_max: usize,
    /// A planted bug (feature `mutants`).
    #[cfg(feature = "mutants")]
    pub mutant: Option<super::ClusterMutant>,
}

impl Default for ClusterSettings {
    fn default() -> Self {
        ClusterSettings {
            members: 1,
            own: MemberId(0),
            fenced: false,
            lease_ttl: Duration::from_secs(10),
            renew_every: Duration::from_secs(2),
            drift_permille: 10,
            resend_after: Duration::from_millis(200),
            resend_after_max: Duration::from_secs(10),
            operations_max: 4096,
            records_in_flight_max: 256,
            names_max: 65_536,
            name_bytes_max: 512,
            entries_per_message_max: 512,
            #[cfg(feature = "mutants")]
            mutant: None,
        }
    }
}

impl ClusterSettings {
    /// Refuses what cannot be, naming the field, its value and the remedy.
    ///
    /// # Errors
    /// The first field that cannot be.
    pub fn check(self) -> Result<CheckedClusterSettings, SettingsError> {
        let wrong = |field, value: String, remedy: &str| {
            Err(SettingsError {
                field,
                value,
                remedy: remedy.to_owned(),
            })
        };
        if self.members == 0 || self.members > MemberSet::MEMBERS_MAX {
            return wrong("members", self.members.to_string(), "give 1 to 64");
        }
        if self.own.0 >= self.members {
            return wrong(
                "own",
                self.own.0.to_string(),
                "give a place in the list, counted from 0",
            );
        }
        if self.fenced && self.members < 3 {
            return wrong(
                "fenced",
                format!("true with {} members", self.members),
                "list at least three members, or do without the fence: unreachable members are then unconfirmed",
            );
        }
        for (field, duration) in [
            ("lease_ttl", self.lease_ttl),
            ("renew_every", self.renew_every),
            ("resend_after", self.resend_after),
            ("resend_after_max", self.resend_after_max),
        ] {
            if duration < Duration::from_millis(1) || duration > Duration::from_secs(86_400) {
                return wrong(field, format!("{duration:?}"), "give 1 ms to 1 day");
            }
        }
        if self.fenced && self.lease_ttl <= self.renew_every * 2 {
            return wrong(
                "lease_ttl",
                format!("{:?}", self.lease_ttl),
                "give more than twice renew_every: one lost message would end the lease",
            );
        }
        if self.resend_after_max < self.resend_after {
            return wrong(
                "resend_after_max",
                format!("{:?}", self.resend_after_max),
                "give at least resend_after",
            );
        }
        if self.drift_permille > 1000 {
            return wrong(
                "drift_permille",
                self.drift_permille.to_string(),
                "give thousandths, at most 1000",
            );
        }
        for (field, value, most) in [
            ("operations_max", self.operations_max, 1 << 20),
            ("records_in_flight_max", self.records_in_flight_max, 1 << 20),
            ("names_max", self.names_max, 1 << 30),
            ("name_bytes_max", self.name_bytes_max, 1 << 16),
            ("entries_per_message_max", self.entries_per_message_max, 1 << 16),
        ] {
            if value == 0 || value > most {
                return wrong(field, value.to_string(), &format!("give 1 to {most}"));
            }
        }
        Ok(CheckedClusterSettings(self))
    }
}

/// Settings that were checked.
#[derive(Clone, Debug)]
pub struct CheckedClusterSettings(ClusterSettings);

impl CheckedClusterSettings {
    /// How many of the list are more than half of it.
    #[must_use]
    pub fn majority(&self) -> usize {
        self.members as usize / 2 + 1
    }

    /// How long a coordinator waits until no lease that it does not know of is left: a lease on the slowest clock, read on the fastest, in whole nanoseconds.
    #[must_use]
    pub fn fence_wait(&self) -> Duration {
        self.lease_ttl + self.lease_ttl * self.drift_permille / 1000 + Duration::from_micros(1)
    }

    /// Every member but this one.
    pub(super) fn others(&self) -> impl Iterator<Item = MemberId> + use<> {
        let own = self.own;
        (0..self.members).map(MemberId).filter(move |member| *member != own)
    }
}

impl std::ops::Deref for CheckedClusterSettings {
    type Target = ClusterSettings;
    fn deref(&self) -> &ClusterSettings {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fenced(members: u32) -> ClusterSettings {
        ClusterSettings {
            members,
            fenced: true,
            ..ClusterSettings::default()
        }
    }

    fn refused(settings: ClusterSettings) -> &'static str {
        settings.check().expect_err("it cannot be").field
    }

    #[test]
    fn a_fence_wants_three_members_and_a_lease_that_outlives_a_lost_renewal() {
        assert!(fenced(3).check().is_ok());
        let error = fenced(2).check().expect_err("two cannot be fenced");
        assert!(error.to_string().contains("at least three members"), "{error}");
        let mut settings = fenced(3);
        settings.lease_ttl = settings.renew_every * 2;
        assert_eq!(refused(settings.clone()), "lease_ttl");
        settings.fenced = false;
        assert!(settings.check().is_ok());
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (field, change) in [
            (
                "members",
                (|settings| settings.members = 65) as fn(&mut ClusterSettings),
            ),
            ("own", |settings| settings.own = MemberId(3)),
            ("lease_ttl", |settings| settings.lease_ttl = Duration::ZERO),
            ("renew_every", |settings| settings.renew_every = Duration::ZERO),
            ("resend_after_max", |settings| {
                settings.resend_after_max = Duration::from_millis(1);
            }),
            ("drift_permille", |settings| settings.drift_permille = 1001),
            ("operations_max", |settings| settings.operations_max = 0),
            ("records_in_flight_max", |settings| settings.records_in_flight_max = 0),
            ("names_max", |settings| settings.names_max = 0),
            ("name_bytes_max", |settings| settings.name_bytes_max = 0),
            ("entries_per_message_max", |settings| {
                settings.entries_per_message_max = 0
            }),
        ] {
            let mut settings = fenced(3);
            change(&mut settings);
            assert_eq!(refused(settings), field);
        }
    }

    #[test]
    fn the_wait_covers_a_lease_on_a_clock_that_is_slower_by_the_drift() {
        let mut settings = fenced(3);
        settings.lease_ttl = Duration::from_secs(10);
        settings.drift_permille = 50;
        let settings = settings.check().expect("these can be");
        assert!(settings.fence_wait() >= Duration::from_millis(10_500));
        assert_eq!(settings.majority(), 2);
    }
}
