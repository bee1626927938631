fn main() {
    let o = kvtier_bench::transfer::Options {
        transports: std::env::args().skip(1).take_while(|a| a != "--").collect(),
        rounds: std::env::var("ROUNDS").ok().map(|r| r.parse().unwrap()),
        ..Default::default()
    };
    let rows = kvtier_bench::transfer::run(&o, &mut |w| eprintln!("{w}")).unwrap();
    for b in kvtier_bench::transfer::meets(&rows) {
        println!("{b}");
    }
    for r in rows {
        println!("{r:?}");
    }
}
